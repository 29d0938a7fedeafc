"""The report of the benchmark of equal work: metrics and loss curves over seeds, and whether differences exceed the spread.

    python benchmarks/equal_work_report.py RESULT.json RESULT.json      # results of other seeds

pools them and writes one result of all their seeds under today's date.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders.equal_work import METRICS, MODES, PRETRAINED
from harness import Result, script
from report import Block, Record, Report, Table, missing_lines, packed_line, with_failure
from scipy.stats import t as student

from sharding.cli import option, positional
from train.records.runs import read_json

OTHERS = ("lightly", "plain", "plain-joint", "replayed")  # those that ours is compared with
METRIC_NAMES = tuple(f"{title} {words}" for title in MODES.values() for words in METRICS.values())
LARGEST = 2.0  # times the spread: of a curve's many points one is far off by chance
FIRST_LOSS = {False: 1e-4, True: 1e-2}  # on the very same views and weights, at most: in float32 and in bf16 (True)
_ROWS = 12  # of the table of losses, about


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Record | None:
    """Ours less another's, of the same seeds. None for fewer than two seeds in common.

    mean; low, high: 95 % interval of the mean difference, paired by seed (Student's t); spread: the standard deviation over
    seeds, of both (the root of their mean variance); seeds: how many.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    half = float(student.ppf(0.975, len(seeds) - 1)) * statistics.stdev(differences) / math.sqrt(len(seeds))
    variances = [statistics.variance([whose[seed] for seed in seeds]) for whose in (ours, theirs)]
    spread = math.sqrt(statistics.fmean(variances))
    found = {"mean": mean, "low": mean - half, "high": mean + half, "spread": spread, "seeds": len(seeds)}
    return found | {"verdict": _verdict(found, within=abs(mean) <= spread)}


def _verdict(found: Record, *, within: bool) -> str:
    return "within the spread" if within else "not decided" if found["low"] <= 0 <= found["high"] else "MISSED"


def epoch_differences(ours: Mapping[int, Sequence[float]], theirs: Mapping[int, Sequence[float]]) -> list[Record]:
    """Of each epoch, of curves of the same length by seed. Empty for fewer than two seeds in common."""
    epochs = range(len(next(iter(ours.values()), ())))
    by_epoch = (({seed: curve[epoch] for seed, curve in each.items()} for each in (ours, theirs)) for epoch in epochs)
    return [found for sides in by_epoch if (found := difference(*sides))]


def curve_difference(ours: Mapping[int, Sequence[float]], theirs: Mapping[int, Sequence[float]]) -> Record | None:
    """Of two curves of the mean loss of each epoch, over the same seeds; None for fewer than two in common.

    mean: of their distances; largest: the distance where they are furthest apart; of that epoch (1 for the first) also low and
    high, as of a difference. spread: as of a difference, over all epochs (the root of the mean variance).
    """
    by_epoch = epoch_differences(ours, theirs)
    if not by_epoch:
        return None
    furthest = max(by_epoch, key=lambda found: abs(found["mean"]))
    mean = statistics.fmean(abs(found["mean"]) for found in by_epoch)
    largest, spread = abs(furthest["mean"]), math.sqrt(statistics.fmean(found["spread"] ** 2 for found in by_epoch))
    within = mean <= spread and largest <= LARGEST * spread
    return {"mean": mean, "largest": largest, "epoch": by_epoch.index(furthest) + 1} | {
        **{key: furthest[key] for key in ("low", "high", "seeds")},
        "spread": spread,
        "verdict": _verdict(furthest, within=within),
    }


def epoch_means(losses: Sequence[float], epochs: int) -> list[float]:
    """The curve: the mean loss of each epoch, from the losses of all steps."""
    assert len(losses) % epochs == 0, (len(losses), epochs)
    steps = len(losses) // epochs
    return [statistics.fmean(losses[epoch * steps : (epoch + 1) * steps]) for epoch in range(epochs)]


def metric_of(record: Record, name: str, metric: str) -> dict[int, float]:
    """By seed."""
    return {run["seed"]: run["figures"][metric] for run in record["runs"].get(name, ())}


def curves_of(record: Record, name: str, curve: str = "curve") -> dict[int, list[float]]:
    """By seed. curve: the mean of each epoch, or "first_epoch", each step's loss."""
    return {run["seed"]: run[curve] for run in record["runs"].get(name, ()) if curve in run}


def pooled(results: Mapping[str, Record]) -> Record:
    """The record of all seeds of several results, by their names. Raises ValueError where they are not of the same task, but for
    the seeds, or share one."""
    (first_name, first), *others = results.items()
    runs = {name: list(found) for name, found in first["runs"].items()}
    seeds = list(first["settings"]["seeds"])
    for place, record in others:
        if unlike := [each for each, value in _task(first).items() if _task(record)[each] != value]:
            raise ValueError(f"{place} and {first_name} differ in {', '.join(unlike)}: only results of the same task add up")
        if shared := sorted(set(seeds) & set(record["settings"]["seeds"])):
            raise ValueError(f"{place} has seed {shared[0]}, which another has too: each seed counts once")
        seeds += record["settings"]["seeds"]
        for name in runs:
            runs[name] += record["runs"][name]
    commits = dict.fromkeys(record["commit"] for record in results.values())
    return first | {"settings": first["settings"] | {"seeds": seeds}, "runs": runs, "commit": ", ".join(commits)}


def _task(record: Record) -> Record:
    """What must be the same where results are put together."""
    settings = {name: value for name, value in record["settings"].items() if name not in ("seeds", "cores", "at_once")}
    for name in ("learnt_from", "judged_on"):
        settings[name] = {key: record[name][key] for key in ("name", "patches", "test") if key in record[name]}
    return {**settings, "versions": record["versions"], "failed": record["failed"], "contenders": sorted(record["runs"])}


# ---- The report ----


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing."""
    metrics, curves = [], []
    for name in OTHERS:
        for metric in METRIC_NAMES:
            if found := difference(metric_of(record, "ours", metric), metric_of(record, name, metric)):
                metrics.append({"other": name, "figure": metric, **found})
        if curve := curve_difference(curves_of(record, "ours"), curves_of(record, name)):
            curves.append({"other": name, **curve})
    first, again = (curves_of(record, name, "first_epoch") for name in ("ours", "replayed"))
    largest = max((abs(first[seed][0] - again[seed][0]) for seed in first.keys() & again.keys()), default=None)
    record = record | {"differences": metrics, "curve_differences": curves, "first_loss_difference": largest}
    s, learnt, judged = record["settings"], record["learnt_from"], record["judged_on"]
    packed = dict.fromkeys(packed_line(each) for each in (learnt, judged) if "packed_by" in each)
    blocks: list[Block] = [
        f"{s['backbone']} at {s['image_size']} px, recipe {s['recipe']}, {s['epochs']} epochs of {learnt['patches']:,}"
        f" {'drawn' if record['drawn'] else 'real'} training patches of {learnt['name']!r} in batches of {s['batch_size']} (an"
        f" incomplete one is left out), {s['steps']:,} steps; Adam at 3e-4, warm-up for a tenth of them, then half a cosine;"
        f" {'bf16' if s['bf16'] else 'float32'} on the {s['device']}; seeds {', '.join(map(str, s['seeds']))}.",
        *([" ".join(packed)] if packed else []),
        "All start from the same backbone (and, but for lightly, head) of each seed and read the same patches of the same shards."
        " lightly draws its own order and views. Plain torch has our order of the patches and draws its own views; it and lightly"
        " put one view after the other through the network, so that batch norm sees them apart. Ours puts them through together,"
        " and so does plain torch with both views as one batch. On our draws, torchvision makes the views that ours made, both as"
        " one batch: two curves of the same numbers, computed twice, that rounding drives apart. Nobody blurs.",
        f"Evaluated by train/evaluate.py, with the seed of the pretraining, on the {judged['test']:,} test patches of"
        f" {judged['name']!r}, whose groups {'are not' if judged['grouped'] else 'may be'} in its training split: mean ± standard"
        " deviation over the seeds.",
        metrics_table(record),
        "Differences are means over seeds, with 95 % intervals paired by seed. The spread is the standard deviation over seeds."
        " Within the spread: the difference is at most that. MISSED: it is more, and 0 is outside the interval. Not decided: it"
        " is more, and 0 is inside. A curve is within the spread where its mean distance is, and the largest is at most"
        f" {LARGEST:g} times that; otherwise the interval where it is largest decides.",
        *verdict_lines(record),
        f"Mean loss of an epoch (nothing learnt: {math.log(2 * s['batch_size'] - 1):.3f}), mean ± standard deviation over the"
        " seeds:",
        curve_table(record),
    ]
    return Report(record, "Quality at equal work", blocks)


def verdict_lines(record: Record) -> list[str]:
    lines = []
    for row in record["differences"]:
        lines.append(
            f"- {row['verdict']}: {row['figure']}, ours less {_title(row['other'])}: {_interval(row)}, spread over"
            f" {row['seeds']} seeds {row['spread']:.4f}"
        )
    for row in record["curve_differences"]:
        lines.append(
            f"- {row['verdict']}: loss by epoch, ours against {_title(row['other'])}: mean distance {row['mean']:.4f}, largest"
            f" {row['largest']:.4f} (epoch {row['epoch']}: [{row['low']:+.4f}, {row['high']:+.4f}]),"
            f" spread over {row['seeds']} seeds {row['spread']:.4f}"
        )
    first, enough = record["first_loss_difference"], FIRST_LOSS[record["settings"]["bf16"]]
    if first is not None:
        words = "reached" if first <= enough else "MISSED"
        lines.append(f"- {words}: the first step's loss on the same draws: differs by {first:.2g}, wanted at most {enough:g}")
    if not lines:
        lines.append("- not measured: nothing that could be compared has finished with two seeds")
    lines += missing_lines(record, PRETRAINED)
    # The two plain loops have the same order, views and weights.
    if norms := epoch_differences(curves_of(record, "plain-joint"), curves_of(record, "plain")):
        what = f"{_title('plain-joint')}, less {_title('plain')}"
        lines.append(f"- batch norm alone, loss of each epoch, {what}: {', '.join(map(_interval, norms))}")
    # What pretraining does to the metrics: were it nothing, equal metrics would say nothing.
    scales = {name: difference(metric_of(record, "ours", name), metric_of(record, "random", name)) for name in METRIC_NAMES}
    if found := [f"{name} {_interval(scale, 3)}" for name, scale in scales.items() if scale]:
        lines.append(f"- for scale, ours less random weights: {', '.join(found)}")
    return lines


def _interval(found: Record, digits: int = 4) -> str:
    mean, low, high = (f"{found[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def metrics_table(record: Record) -> Table:
    """Mean and deviation over the seeds, a row for each contender."""
    rows = []
    for name, runs in record["runs"].items():
        cells = [_over_seeds(list(metric_of(record, name, metric).values()), 3) for metric in METRIC_NAMES]
        last = [curve[-1] for curve in curves_of(record, name).values()]
        rows.append([with_failure(_title(name), record, name), str(len(runs)), *cells, _over_seeds(last, 3)])
    return Table(["", "seeds", *METRIC_NAMES, "loss of the last epoch"], rows)


def curve_table(record: Record) -> Table:
    """The mean loss of some epochs, mean and deviation over the seeds."""
    curves = {name: found.values() for name in record["runs"] if (found := curves_of(record, name))}
    epochs = record["settings"]["epochs"]
    shown = sorted({round(1 + place * (epochs - 1) / (_ROWS - 1)) for place in range(_ROWS)})
    rows = [[str(epoch), *(_over_seeds([c[epoch - 1] for c in each], 4) for each in curves.values())] for epoch in shown]
    return Table(["epoch", *map(_title, curves)], rows)


def _over_seeds(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _title(name: str) -> str:
    return PRETRAINED[name].title


@dataclass(frozen=True)
class Config:
    """What is pooled."""

    results: list[str] = positional("JSON files of equal_work.py, of the same task and other seeds")
    out: str = option("benchmarks/results", "folder for the result of all of them")


def main(config: Config) -> None:
    results = {place: read_json(Path(place), "give results of equal_work.py") for place in config.results}
    result = Result(config.out, "equal-work")
    today = {name: result.record[name] for name in ("date", "command")}
    result.finish(report_of(pooled(results) | today))


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
