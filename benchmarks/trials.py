"""Do trials that share a machine take as long as they should? A grid on Ray Tune against its trials one after another, alone.

    python benchmarks/trials.py --work DISK/bench           # one trial for each core

Alone, a trial is `train/pretrain.py --workers 0` in a process of its own, with the core that it has in the grid, and its time is
that of its run's record, without starting Python and reading the set. The grid's time is that of the whole command,
`tune/grid.py`, from start to exit. A grid should take at most 1.15 x the sum of the times alone / the number that fit at a time.
With short trials the start of Ray is most of the difference, so the time between the first trial's start and the last one's end
is reported too. The second scenario is 16 tiny cells, eight pretrainings and a linear classifier on each.

Results: <out>/<date>-trials.json and .md.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness import Result, check_at_least, chosen, draw_labelled_set, run_fresh, script
from patch_set import patch_set
from report import Record, Report, Table, Target, judge, medians, target_lines
from worker import ROOT

from sharding.cli import option, required
from sharding.process_pool import available_cores
from train.records.runs import Run

TINY = 16
FIELDS: Record = {"backbone": "test_resnet", "image_size": 64, "batch_size": 64, "probe_every": 0}
PATCHES = 2048  # of an epoch
SCENARIOS = ("grid", "tiny")
TARGETS = (
    Target("grid", "ratio", 1.15, "the whole grid / (sum alone / number that fit)", at_least=False),
    Target("grid", "tiny_s", 180.0, f"{TINY} tiny cells, s", at_least=False),
)


@dataclass(frozen=True)
class Config:
    """How many trials, and how long each."""

    work: str = required("a folder to work in: drawn images, shard sets and runs stay there")
    out: str = option("benchmarks/results", "folder for the results")
    trials: int = option(4, "trials of the grid")
    epochs: int = option(8, "epochs of a trial")
    rounds: int = option(3, "how often the grid and its trials alone are run")
    scenarios: list[str] = option(list(SCENARIOS), f"only these of {', '.join(SCENARIOS)}")


def study_text(shards: str, storage: Path, *, trials: int, epochs: int) -> str:
    """A study file with a pretraining for each seed, on a core each. YAML takes JSON as it is."""
    fields = FIELDS | {"data": shards, "epochs": epochs, "seed": list(range(1, trials + 1))}
    resources = {"pretrain": {"cpus": 1, "gpus": 0}}
    stages = {"trial": {"pretrain": fields}}
    return json.dumps({"name": "trials", "storage": str(storage), "stages": stages, "resources": resources})


def tiny_text(shards: str, storage: Path) -> str:
    fields = FIELDS | {"image_size": 32, "batch_size": 32, "epochs": 1, "data": shards}
    stages = {
        "simclr": {"pretrain": fields | {"seed": list(range(1, TINY // 2 + 1))}},
        "linear": {"evaluate": {"data": shards, "backbone": "simclr"}},
    }
    return json.dumps({"name": "tiny", "storage": str(storage), "stages": stages})


def spans(storage: Path) -> tuple[float, float]:
    """Of the runs there: the sum of their own times, and the time from the first one's start to the last one's end; seconds."""
    results = sorted(storage.glob("*/result.json"))
    seconds = [Run(found.parent).record["wall_seconds"] for found in results]
    ends = [found.stat().st_mtime for found in results]
    return sum(seconds), max(ends) - min(end - each for end, each in zip(ends, seconds, strict=True))


def run_grid(text: str, storage: Path) -> Record:
    """seconds of the command; between: its first run's start and its last one's end. Raises RunFailed."""
    path = storage.with_suffix(".yaml")
    path.write_text(text, encoding="utf-8")
    started = time.perf_counter()
    run_fresh([sys.executable, str(ROOT / "tune" / "grid.py"), str(path)], storage.with_suffix(".log"))
    return {"seconds": time.perf_counter() - started, "between": spans(storage)[1]}


def run_alone(shards: str, storage: Path, *, trials: int, epochs: int) -> float:
    """The runs' own seconds, summed. Raises RunFailed."""
    fields = FIELDS | {"data": shards, "epochs": epochs, "workers": 0, "threads": 1, "storage": storage}
    command = [sys.executable, str(ROOT / "train" / "pretrain.py")]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    for seed in range(1, trials + 1):
        flags = [f"--name=trial-{seed}", f"--seed={seed}"]
        run_fresh([*command, *flags], storage.with_suffix(".log"), environment={"OMP_NUM_THREADS": "1"})
    return spans(storage)[0]


def main(config: Config) -> None:
    check_at_least(config, trials=2, epochs=1, rounds=1)
    wanted = chosen(config.scenarios, SCENARIOS, "scenario")
    cores, work = available_cores(), Path(config.work).resolve()
    result = Result(config.out, "trials", ["torch", "ray", "timm"])
    shards = patch_set(
        None, work, patches=PATCHES, size=FIELDS["image_size"], batch_size=FIELDS["batch_size"], cores=cores
    ).shards
    tiny_shards = str(draw_labelled_set(work, 240, 48, slides=12, seed=1))
    length = {"trials": config.trials, "epochs": config.epochs}
    result.record["timed"] = FIELDS | length | {"fit": cores, "rounds": config.rounds}
    with tempfile.TemporaryDirectory(dir=work, prefix="trials-", ignore_cleanup_errors=True) as folder:

        def measure(scenario: str) -> Record:
            storage = Path(folder) / f"{scenario}-{time.monotonic_ns()}"
            if scenario == "tiny":
                return run_grid(tiny_text(tiny_shards, storage), storage)
            alone = run_alone(shards, storage.with_name(f"{storage.name}-alone"), **length)
            return run_grid(study_text(shards, storage, **length), storage) | {"alone": alone}

        result.rounds(wanted, config.rounds, measure, str)
    result.finish(report_of(result.record))


def summary_of(record: Record) -> Record:
    """Medians over rounds; ratios within one."""
    grids, tiny = (record["runs"].get(scenario, []) for scenario in SCENARIOS)
    shares = [each["alone"] / record["timed"]["fit"] for each in grids]
    found = [
        {
            "alone_s": each["alone"],
            "grid_s": each["seconds"],
            "between_s": each["between"],
            "ratio": each["seconds"] / share,
            "ratio_between": each["between"] / share,
        }
        for each, share in zip(grids, shares, strict=True)
    ]
    summary: Record = medians(found, *found[0]) if found else {}
    return summary | ({"tiny_s": medians(tiny, "seconds")["seconds"]} if tiny else {})


def report_of(record: Record) -> Report:
    timed, found = record["timed"], summary_of(record)
    record = record | {"summary": found, "targets": judge({"grid": found}, TARGETS)}
    rows = []
    if "ratio" in found:
        rows += [
            [f"{timed['trials']} trials alone, one after another, summed", f"{found['alone_s']:.1f}", "-"],
            [f"the grid, {timed['fit']} at a time: the whole command", f"{found['grid_s']:.1f}", f"{found['ratio']:.2f}"],
            ["from its first trial's start to the last one's end", f"{found['between_s']:.1f}", f"{found['ratio_between']:.2f}"],
        ]
    if "tiny_s" in found:
        rows.append([f"{TINY} tiny cells: the whole command", f"{found['tiny_s']:.1f}", "-"])
    text = (
        f"Pretrainings of {timed['backbone']}, {timed['image_size']} px, batch {timed['batch_size']}, {timed['epochs']} epochs of"
        f" {PATCHES:,} patches, a core each; medians over {timed['rounds']} rounds, ratios within one."
    )
    table = Table(["what", "s", "/ (alone / fit)"], rows)
    return Report(record, "Trials that share a machine", [text, table, *target_lines(record)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
