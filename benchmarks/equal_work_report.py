"""The report of the benchmark of equal work: metrics and loss curves over seeds, and whether differences exceed the spread.

    python benchmarks/equal_work_report.py RESULT.json RESULT.json      # results of other seeds

pools them and writes one result of all their seeds under today's date.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from contenders.equal_work import METRICS, MODES, PRETRAINED
from harness import Result, script
from report import Block, Record, Report, Table, missing_lines, packed_line, with_failure
from scipy.stats import t as student

from sharding.cli import option, positional

OTHERS = ("lightly", "plain", "plain-joint", "replayed")  # those that ours is compared with
METRIC_NAMES = tuple(f"{title} {words}" for title in MODES.values() for words in METRICS.values())
LARGEST = 2.0  # times the spread: of a curve's many points one is far off by chance
FIRST_LOSS = {False: 1e-4, True: 1e-2}  # on the very same views and weights, at most: in float32 and in bf16 (True)
_SETS = ("learnt_from", "judged_on")
_ROWS = 12  # of the table of losses, about


class Difference(NamedTuple):
    """Ours less another's, of the same seeds. low, high: 95 % interval of the mean difference, paired by seed (Student's t).

    spread: the standard deviation over seeds, of both (the root of their mean variance); seeds: how many.
    """

    mean: float
    low: float
    high: float
    spread: float
    seeds: int

    @property
    def verdict(self) -> str:
        if abs(self.mean) <= self.spread:
            return "within the spread"
        return "not decided" if self.low <= 0 <= self.high else "MISSED"


class CurveDifference(NamedTuple):
    """Of two curves of the mean loss of each epoch, over the same seeds: the mean of their distances, and where they are furthest
    apart the epoch (1 for the first), the distance there (largest), and the interval of ours less the other's, as of a difference
    (low, high). spread: as of a difference, over all epochs (the root of the mean variance)."""

    mean: float
    largest: float
    epoch: int
    low: float
    high: float
    spread: float
    seeds: int

    @property
    def verdict(self) -> str:
        if self.mean <= self.spread and self.largest <= LARGEST * self.spread:
            return "within the spread"
        return "not decided" if self.low <= 0 <= self.high else "MISSED"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Of a metric by seed. None for fewer than two seeds in common."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    half = float(student.ppf(0.975, len(seeds) - 1)) * statistics.stdev(differences) / math.sqrt(len(seeds))
    variances = [statistics.variance([whose[seed] for seed in seeds]) for whose in (ours, theirs)]
    return Difference(mean, mean - half, mean + half, math.sqrt(statistics.fmean(variances)), len(seeds))


def epoch_differences(ours: Mapping[int, Sequence[float]], theirs: Mapping[int, Sequence[float]]) -> list[Difference]:
    """Of each epoch, of curves of the same length by seed. Empty for fewer than two seeds in common."""
    found = []
    for epoch in range(len(next(iter(ours.values()), ()))):
        sides = ({seed: curve[epoch] for seed, curve in curves.items()} for curves in (ours, theirs))
        if each := difference(*sides):
            found.append(each)
    return found


def curve_difference(ours: Mapping[int, Sequence[float]], theirs: Mapping[int, Sequence[float]]) -> CurveDifference | None:
    """Of curves of the same length by seed. None for fewer than two seeds in common."""
    by_epoch = epoch_differences(ours, theirs)
    if not by_epoch:
        return None
    furthest = max(by_epoch, key=lambda found: abs(found.mean))
    return CurveDifference(
        mean=statistics.fmean(abs(found.mean) for found in by_epoch),
        largest=abs(furthest.mean),
        epoch=by_epoch.index(furthest) + 1,
        low=furthest.low,
        high=furthest.high,
        spread=math.sqrt(statistics.fmean(found.spread**2 for found in by_epoch)),
        seeds=furthest.seeds,
    )


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


def first_losses(record: Record) -> float | None:
    """The largest difference of the first step's loss, ours and on our draws, over the seeds. None: not measured."""
    ours, replayed = (curves_of(record, name, "first_epoch") for name in ("ours", "replayed"))
    found = [abs(ours[seed][0] - replayed[seed][0]) for seed in ours.keys() & replayed.keys()]
    return max(found, default=None)


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


def _task(record: Record) -> dict[str, Any]:
    """What must be the same where results are put together."""
    sets = {name: {key: record[name][key] for key in ("name", "patches", "test") if key in record[name]} for name in _SETS}
    settings = {name: value for name, value in record["settings"].items() if name not in ("seeds", "cores", "at_once")}
    return {**settings, **sets} | {name: record[name] for name in ("versions", "failed")} | {"contenders": sorted(record["runs"])}


# ---- The report ----


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing."""
    names = [name for name in OTHERS if name in record["runs"]]
    metrics, curves = [], []
    for name in names:
        for metric in METRIC_NAMES:
            if found := difference(metric_of(record, "ours", metric), metric_of(record, name, metric)):
                metrics.append({"other": name, "figure": metric, **found._asdict(), "verdict": found.verdict})
        if curve := curve_difference(curves_of(record, "ours"), curves_of(record, name)):
            curves.append({"other": name, **curve._asdict(), "verdict": curve.verdict})
    record = record | {"differences": metrics, "curve_differences": curves, "first_loss_difference": first_losses(record)}
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
        f"Judged by train/evaluate.py, with the seed of the pretraining, on the {judged['test']:,} test patches of"
        f" {judged['name']!r}, whose groups {'are not' if judged['grouped'] else 'may be'} in its training split: mean ± standard"
        " deviation over the seeds.",
        metrics_table(record),
        "Differences are means over seeds, with 95 % intervals paired by seed. The spread is the standard deviation over seeds."
        " Within the spread: the difference is at most that. MISSED: it is more, and 0 is outside the interval. Not decided: it"
        " is more, and 0 is inside. A curve is within the spread where its mean distance is, and the largest is at most"
        f" {LARGEST:g} times that; otherwise the interval where it is largest decides.",
        *verdict_lines(record),
        *_batch_norm(record),
        *_for_scale(record),
        f"Mean loss of an epoch (nothing learnt: {math.log(2 * s['batch_size'] - 1):.3f}), mean ± standard deviation over the"
        " seeds:",
        curve_table(record),
    ]
    return Report(record, "Quality at equal work", blocks)


def verdict_lines(record: Record) -> list[str]:
    lines = []
    for row in record["differences"]:
        lines.append(
            f"- {row['verdict']}: {row['figure']}, ours less {_title(row['other'])}: {row['mean']:+.4f}"
            f" [{row['low']:+.4f}, {row['high']:+.4f}], spread over {row['seeds']} seeds {row['spread']:.4f}"
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
    return lines + missing_lines(record, PRETRAINED)


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


def _batch_norm(record: Record) -> list[str]:
    """What it alone does: the two plain loops have the same order, views and weights."""
    by_epoch = epoch_differences(curves_of(record, "plain-joint"), curves_of(record, "plain"))
    found = [f"{each.mean:+.4f} [{each.low:+.4f}, {each.high:+.4f}]" for each in by_epoch]
    if not found:
        return []
    return [f"- batch norm alone, loss of each epoch, {_title('plain-joint')}, less {_title('plain')}: {', '.join(found)}"]


def _for_scale(record: Record) -> list[str]:
    """What pretraining does to the metrics: were it nothing, equal metrics would say nothing."""
    found = []
    for metric in METRIC_NAMES:
        if scale := difference(metric_of(record, "ours", metric), metric_of(record, "random", metric)):
            found.append(f"{metric} {scale.mean:+.3f} [{scale.low:+.3f}, {scale.high:+.3f}]")
    return [f"- for scale, ours less random weights: {', '.join(found)}"] if found else []


@dataclass(frozen=True)
class Config:
    """What is pooled."""

    results: list[str] = positional("JSON files of equal_work.py, of the same task and other seeds")
    out: str = option("benchmarks/results", "folder for the result of all of them")


def main(config: Config) -> None:
    results = {}
    for place in config.results:
        try:
            results[place] = json.loads(Path(place).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{place} is no result of equal_work.py: {error}") from error
    result = Result(config.out, "equal-work")
    today = {name: result.record[name] for name in ("date", "command")}
    result.finish(report_of(pooled(results) | today))


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
