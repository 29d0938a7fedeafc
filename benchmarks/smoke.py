"""Is something of ours slower than it was? Ratios to baselines that our code does not change, against those committed.

    python benchmarks/smoke.py                      # make bench-smoke: under 3 minutes on 2 cores
    python benchmarks/smoke.py --update             # measure three times and write smoke.json
    python benchmarks/smoke.py --update --runs 20 --out benchmarks/results     # and how far they move by chance

No absolute time is compared: a ratio is the time of a baseline (torchvision on Pillow, DALI's bare decoder, ...) over ours. Both
run in turn on one core (A B A B), each group in a fresh process, and the ratio is the median of the ratios within a round. CPU
time is measured, so that other work on the machine matters little.

A ratio that fell by more than 20 % below benchmarks/smoke.json is named with both numbers, and the exit code is 1; so it is where
a committed one could not be measured. On another kind of processor the ratios are others: write the file there first, at a commit
that you trust, while the machine is quiet. On a busy one baselines of many small steps lose more than ours do: ratios rise by up
to a sixth.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders.smoke import DISTINCT, PATCHES, QUALITY, RATIOS, SIZE, Task
from drawn_images import draw_images
from harness import Result, RunFailed, chosen, machine, run_contender, script
from report import Record, Report, Table, cell, medians, print_blocks

from sharding.cli import option
from sharding.packing import build_shards
from sharding.process_pool import available_cores
from train.records.runs import read_json, write_json

COMMITTED = Path(__file__).with_name("smoke.json")
FALL = 0.2  # as a share of the committed ratio: a larger one is an error
_RISE = 0.25  # a larger one is reported: until it is committed, as much can be lost again unseen
_LIMIT_S = 900  # of a group: one that hangs, not a busy machine
_UPDATE_RUNS = 3
_PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "numba", "numpy", "pyarrow", "timm")
# What was measured and is not compared, and why
LEFT_OUT: dict[str, str] = {
    "host": "decoding over reading and drawing was about 118 on a quieter machine, 97 to 103 on a busy one, and once 173",
    "heads-sgd": "small steps of the plain torch loop took up to half more where others used the cache, and ours did not",
}
Ratios = Mapping[str, Mapping[str, Any]]  # by name: ratio, spread, rounds


@dataclass(frozen=True)
class Config:
    """What is done with the ratios."""

    update: bool = option(False, "write what is measured to benchmarks/smoke.json instead of comparing")
    only: list[str] = option([], f"only these of {', '.join(RATIOS)} (default: all)")
    runs: int | None = option(None, f"measure so many times; medians count (default: 1, for --update {_UPDATE_RUNS})")
    seconds: float = option(5.0, "CPU seconds that the rounds of a group take, about")
    out: str | None = option(None, "folder for a dated result with every run; default: none is written")


def main(config: Config) -> None:
    runs = config.runs if config.runs is not None else (_UPDATE_RUNS if config.update else 1)
    if runs < 1:
        raise ValueError(f"--runs {runs} is out of range: give at least 1")
    wanted = chosen(config.only, RATIOS, "ratio")
    if config.only and config.update:
        raise ValueError("--only and --update: smoke.json holds all ratios of one commit; leave one out")
    committed = None if config.update else read_json(COMMITTED, "--update writes it")
    result = Result(config.out or "", "smoke", _PACKAGES, cores=1)
    record = result.record
    record |= {"seconds": config.seconds, "runs": [], "wall_s": []}
    with tempfile.TemporaryDirectory() as folder:
        result.say(f"drawing {PATCHES:,} patches and packing them")
        task = drawn(Path(folder), config.seconds)
        for number in range(1, runs + 1):
            began = time.monotonic()
            record["runs"].append(one_run(wanted, task, result))
            record["wall_s"].append(round(time.monotonic() - began, 1))
            result.say(f"run {number} of {runs}: {record['wall_s'][-1]:.0f} s")
            if config.out:
                result.save()
    found = record["ratios"] = summarise(record["runs"])
    if committed is not None:
        failed, lines = compare(found, committed, wanted, record["failed"])
    else:
        failed, lines = [*record["failed"]], [f"- {name}: not measured: {why}" for name, why in record["failed"].items()]
        if not failed:
            committed = committed_form(record, found)
            write_json(COMMITTED, committed)
            result.say(f"{COMMITTED}")
    print_blocks(result.console, [table(found, committed), *lines])
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
    if config.out:
        result.finish(report_of(record, committed), show=[])
    if failed:
        raise SystemExit(1)


# ---- Measuring ----


def drawn(folder: Path, seconds: float) -> Task:
    """The patches that all groups work on."""
    images = draw_images(folder, patches=PATCHES, size=SIZE, distinct=DISTINCT, quality=QUALITY, workers=available_cores())
    built = build_shards([images], folder / "shards", unlabelled=True, workers=1)
    (folder / "work").mkdir()
    return Task(str(images), str(built.out), str(folder / "work"), seconds)


def one_run(wanted: Sequence[str], task: Task, result: Result) -> dict[str, Record]:
    """The ratios that could be measured; the reasons of the others are in the record."""
    found: dict[str, Record] = {}
    for group in dict.fromkeys(RATIOS[name].group for name in wanted):
        mine = [name for name in wanted if RATIOS[name].group == group]
        try:  # CPU seconds of the group's sides, round by round
            times = run_contender("contenders.smoke", group, task, limit=_LIMIT_S)
        except RunFailed as error:  # the others' ratios are worth having; the exit code tells
            result.record["failed"] |= dict.fromkeys(mine, str(error))
            result.say(f"{group}: FAILED: {error}")
            continue
        for name in mine:
            found[name] = of_rounds(times[RATIOS[name].baseline], times[RATIOS[name].ours])
            result.say(f"{name}: {found[name]['ratio']:.3g} over {found[name]['rounds']} rounds")
    return found


def of_rounds(baseline: Sequence[float], ours: Sequence[float]) -> Record:
    """ratio: the median of the ratios within a round; spread: of their middle half, as a share of it."""
    ratios = [theirs / mine for theirs, mine in zip(baseline, ours, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": ratio, "spread": (high - low) / ratio, "rounds": len(ratios)}


def summarise(runs: Sequence[Ratios]) -> dict[str, Record]:
    """ratio: median over the runs; spread: from the lowest to the highest of them, or where there is one, of its rounds' middle
    half, as a share of the ratio. One that failed in a run is missing."""
    found: dict[str, Record] = {}
    for name in RATIOS:
        mine = [run[name] for run in runs if name in run]
        if len(mine) == len(runs) == 1:
            found[name] = dict(mine[0])
        elif len(mine) == len(runs):
            ratios = [each["ratio"] for each in mine]
            ratio = statistics.median(ratios)
            spread = (max(ratios) - min(ratios)) / ratio
            found[name] = {"ratio": ratio, "spread": spread, "rounds": min(each["rounds"] for each in mine)}
    return found


# ---- Comparing ----


def compare(
    found: Ratios, committed: Mapping[str, Any], wanted: Sequence[str], why: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """The ratios that are an error, and what there is to say. why: by name, for those that could not be measured."""
    failed, lines, known = [], [], committed["ratios"]
    for name in dict.fromkeys((*wanted, *(known if set(wanted) >= set(RATIOS) else ()))):
        was = known.get(name, {}).get("ratio")
        if name not in found:
            failed.append(name)
            reason = why.get(name) or "this benchmark does not know it any more; --update drops it"
            lines.append(f"- {name}: not measured: {reason}")
            continue
        now = found[name]["ratio"]
        if was is None:
            lines.append(f"- {name}: {now:.3g} is new: --update commits it")
        elif fell(now, was):
            failed.append(name)
            fall = f"a fall of {1 - now / was:.0%}, more than {FALL:.0%}"
            lines.append(f"- {name}: {now:.3g}, committed {was:.3g} ({known[name]['means']}): {fall}{_elsewhere(committed)}")
        elif now / was - 1 > _RISE:
            lines.append(f"- {name}: {now:.3g}, committed {was:.3g}: a rise of {now / was - 1:.0%}; --update commits it")
    return failed, lines


def _elsewhere(committed: Mapping[str, Any]) -> str:
    here, there = machine(1)["cpu"], committed["machine"]["cpu"]
    return "" if here == there else f"; it was committed on another processor, {there}, and this is {here}"


def fell(now: float, was: float) -> bool:
    """Too far. NaN has fallen."""
    return not now >= (1 - FALL) * was


def committed_form(record: Record, found: Ratios) -> Record:
    """What smoke.json holds."""
    return {
        "what": "Times of baselines over times of ours: more is better. benchmarks/smoke.py compares, and --update writes this.",
        "spread": "from the lowest to the highest run, as a share of the ratio (of a single run: of its rounds' middle half)",
        **{key: record[key] for key in ("date", "time", "commit", "command", "machine", "versions")},
        "runs": len(record["runs"]),
        "ratios": {
            name: {key: _rounded(each[key]) for key in ("ratio", "spread")}
            | {"rounds": each["rounds"], "means": RATIOS[name].means}
            for name, each in found.items()
        },
        "left_out": LEFT_OUT,
    }


def _rounded(value: float) -> float:
    """To four digits."""
    return round(value, 3 - math.floor(math.log10(abs(value)))) if value else value


# ---- The report ----


def table(found: Ratios, committed: Mapping[str, Any] | None) -> Table:
    known = committed["ratios"] if committed else {}
    rows = []
    for name, each in found.items():
        was = known[name]["ratio"] if name in known else None
        change = cell(None if was is None else each["ratio"] / was - 1, "+.1%")
        rows.append([name, f"{each['ratio']:.3g}", f"{each['spread']:.1%}", cell(was, ".3g"), change])
    return Table(["ratio", "measured", "spread", "committed", "change"], rows)


def report_of(record: Record, committed: Mapping[str, Any] | None) -> Report:
    runs, known = len(record["runs"]), committed["ratios"] if committed else {}
    against = f"commit {committed['commit']}, {committed['date']} {committed['time']}" if committed else "none is"
    text = (
        f"{runs} runs, in each of which a group's rounds take {record['seconds']:g} CPU seconds; a run takes"
        f" {statistics.median(record['wall_s']):,.0f} s of wall time. A ratio is a baseline's time over ours, in CPU seconds on"
        " one core. Of a run it is the median of the ratios within a round; their middle half spreads over that share of it"
        " (median over the runs). Lowest and highest: of the runs, against their median. Falls: runs that were more than"
        f" {FALL:.0%} below the committed ratio ({against})."
    )
    rows, falls = [], {}
    for name, each in record["ratios"].items():
        mine = [run[name] for run in record["runs"]]
        ratios = [one["ratio"] for one in mine]
        cells = [f"{medians(mine, 'rounds')['rounds']:g}", f"{medians(mine, 'spread')['spread']:.1%}", f"{each['ratio']:.3g}"]
        cells += [f"{pick(ratios) / each['ratio'] - 1:+.1%}" for pick in (min, max)]
        if name in known:
            was = known[name]["ratio"]
            falls[name] = sum(fell(ratio, was) for ratio in ratios)
            cells += [f"{was:.3g}", f"{falls[name]} of {runs}"]
        rows.append([RATIOS[name].means, name, *cells, *["-"] * (7 - len(cells))])
    header = ["baseline / ours", "name", "rounds", "middle half", "median", "lowest", "highest", "committed", "falls"]
    lines = [f"- {name}: FAILED: {why}" for name, why in record["failed"].items()]
    lines += [f"- {name}: left out: {why}" for name, why in LEFT_OUT.items()]
    return Report(record | {"falls": falls}, "Ratios of the smoke benchmark", [text, Table(header, rows), *lines])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
