"""How long do heads on frozen features take by a published protocol: ours, a plain torch loop, and scikit-learn for scale?

    python benchmarks/heads.py                       # 3,696 x 2,048 features: one head, and 4 fractions x 5 seeds
    python benchmarks/heads.py --protocol sgd --rounds 5

All contenders get the same drawn features. The plain loop trains by the same protocol, from the same initial weights and in the
same order, and must reach the same validation loss. scikit-learn's LogisticRegression minimises another objective to convergence.

Results: <out>/<date>-heads.json and .md.
"""

import itertools
import statistics
from dataclasses import dataclass
from typing import Literal

from contenders.heads import CONTENDERS, SCENARIOS, Task
from harness import Result, RunFailed, check_at_least, chosen, cores_of, run_contender, script
from report import Record, Report, Table, Target, cell, judge, medians, ratio, target_lines

from sharding.cli import option

DEFAULT_SIZE = (3696, 2048, 100)  # rows, features, epochs
# Of the default size
TARGETS = (
    Target("one", "seconds", 3.0, f"ours, {SCENARIOS['one']}, s", at_least=False),
    Target("grid", "seconds", 20.0, f"ours, {SCENARIOS['grid']}, s", at_least=False),
)
_LOSS_ERROR = 1e-3  # relative; thousands of steps in float32, with sums in another order


@dataclass(frozen=True)
class Config:
    """Which heads, on how many features."""

    out: str = option("benchmarks/results", "folder for the results")
    contenders: list[str] = option([], f"only these of {', '.join(CONTENDERS)} (default: all)")
    protocol: Literal["adam", "sgd"] = option("adam", "by which the heads are trained")
    rows: int = option(DEFAULT_SIZE[0], "rows to learn from; a quarter as many are drawn for validation")
    features: int = option(DEFAULT_SIZE[1], "F, their width")
    classes: int = option(3, "K")
    epochs: int = option(DEFAULT_SIZE[2], "epochs, at most")
    rounds: int = option(3, "how often each contender runs")
    cores: int = option(0, "cores that every contender may use (0: all)")


def main(config: Config) -> None:
    names = chosen(config.contenders, CONTENDERS)
    check_at_least(config, rows=80, features=1, classes=2, epochs=1, rounds=1)
    cores = cores_of(config.cores)
    result = Result(config.out, "heads", ["torch", "numba", "numpy", "scikit-learn"], cores=cores)
    timed = {name: getattr(config, name) for name in ("protocol", "rows", "features", "classes", "epochs", "rounds")}
    runs: dict[str, dict[str, list[Record]]] = {scenario: {name: [] for name in names} for scenario in SCENARIOS}
    result.record |= {"timed": timed, "runs": runs}
    for scenario, number, name in itertools.product(SCENARIOS, range(1, config.rounds + 1), names):
        task = Task(scenario, config.protocol, config.rows, config.features, config.classes, config.epochs, cores)

        def measure(name: str = name, task: Task = task) -> Record:
            run = run_contender("contenders.heads", name, task)
            if wrong := other_loss(name, run, runs[task.scenario]):
                raise RunFailed(wrong)
            return run

        key, title = f"{name}, {scenario}, round {number}", f"{scenario}, round {number}: {name}"
        if found := result.attempt(key, title, measure, lambda run: f"{run['seconds']:.2f} s"):
            runs[scenario][name].append(found)
        result.save()
    result.finish(report_of(result.record))


def other_loss(name: str, run: Record, runs: dict[str, list[Record]]) -> str | None:
    """What is wrong where ours and the plain loop do not reach the same loss, on the mean over the tasks."""
    for other in ("plain", "ours"):
        if name in ("plain", "ours") and other != name and runs.get(other):
            mine, theirs = (statistics.mean(each["validation_losses"]) for each in (run, runs[other][0]))
            if not abs(mine / theirs - 1) < _LOSS_ERROR:
                return f"its validation loss is {mine:.4g}, that of {CONTENDERS[other].title} {theirs:.4g}"
    return None


def summarise(runs: dict[str, dict[str, list[Record]]]) -> dict[str, dict[str, Record]]:
    """By scenario and contender: medians over the rounds, and ratios to ours within a round."""
    return {
        scenario: {
            name: {
                **medians(found, "seconds", "first_s"),
                "time_to_ours": ratio(found, contenders.get("ours"), "seconds"),
                "validation_loss": statistics.mean(found[0]["validation_losses"]),
            }
            for name, found in contenders.items()
            if found
        }
        for scenario, contenders in runs.items()
    }


def report_of(record: Record) -> Report:
    timed, summary = record["timed"], summarise(record["runs"])
    same_size = (timed["rows"], timed["features"], timed["epochs"]) == DEFAULT_SIZE
    mine = {scenario: here.get("ours", {}) for scenario, here in summary.items() if same_size}
    record = record | {"summary": summary, "targets": judge(mine, TARGETS)}
    text = (
        f"Seconds of training linear heads by the protocol {timed['protocol']!r} on {timed['rows']:,} x {timed['features']:,}"
        f" features of {timed['classes']} classes, {timed['epochs']} epochs at most, beside a validation part of a quarter as"
        f" many rows; medians over {timed['rounds']} rounds, each in a fresh process, after a first call on a tiny task, which"
        " compiles or loads. Ratios are medians of the ratios within a round. The validation loss is the mean over the heads,"
        " nats."
    )
    rows = []
    for scenario, here in summary.items():
        for name, found in here.items():
            cells = [f"{found['seconds']:.2f}", cell(found["time_to_ours"])]
            cells += [f"{found['validation_loss']:.4f}", f"{found['first_s']:.2f}"]
            rows.append([f"{SCENARIOS[scenario]}: {CONTENDERS[name].title}", *cells])
    table = Table(["heads", "s", "/ ours", "validation loss", "first call, s"], rows)
    return Report(record, "Heads on frozen features", [text, table, *target_lines(record)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
