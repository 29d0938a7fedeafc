"""Is something of ours slower than it was? Ratios to baselines that our code does not change, against those committed.

    python benchmarks/smoke.py                      # make bench-smoke: about a minute on 2 cores
    python benchmarks/smoke.py --update             # measure three times and write smoke.json
    python benchmarks/smoke.py --update --runs 20   # the same with a spread that says how far they move by chance

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders.smoke import DISTINCT, PATCHES, QUALITY, RATIOS, SIZE, Task
from drawn_images import draw_images
from harness import Result, RunFailed, check_at_least, machine, run_contender, script
from report import Record, Table, cell, print_blocks

from sharding.cli import option
from sharding.packing import build_shards
from sharding.process_pool import available_cores
from train.records.json_files import read_json, write_json

COMMITTED = Path(__file__).with_name("smoke.json")
FALL = 0.2  # as a share of the committed ratio: a larger one is an error
SECONDS = 5.0  # of CPU time that the rounds of a group take, about
_LIMIT_S = 900  # of a group: one that hangs, not a busy machine
_UPDATE_RUNS = 3
_PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "numba", "numpy", "pyarrow", "timm")
Ratios = Mapping[str, Mapping[str, Any]]  # by name: ratio, spread, rounds


@dataclass(frozen=True)
class Config:
    """What is done with the ratios."""

    update: bool = option(False, "write what is measured to benchmarks/smoke.json instead of comparing")
    runs: int | None = option(None, f"measure so many times; medians count (default: 1, for --update {_UPDATE_RUNS})")


def main(config: Config) -> None:
    check_at_least(config, runs=1)
    runs = config.runs or (_UPDATE_RUNS if config.update else 1)
    committed = None if config.update else read_json(COMMITTED, "--update writes it")
    result = Result("", "smoke", _PACKAGES, cores=1)
    with tempfile.TemporaryDirectory() as folder:
        result.say(f"drawing {PATCHES:,} patches and packing them")
        task = drawn(Path(folder))
        measured = []
        for number in range(1, runs + 1):
            measured.append(one_run(task, result))
            result.say(f"run {number} of {runs} is done")
    found, why = summarise(measured), result.record["failed"]
    if committed is not None:
        failed, lines = compare(found, committed, why)
    else:
        failed, lines = [*why], [f"- {name}: not measured: {reason}" for name, reason in why.items()]
        if not failed:
            committed = committed_form(result.record, found, runs)
            write_json(COMMITTED, committed)
            result.say(f"{COMMITTED}")
    print_blocks(result.console, [table(found, committed), *lines])
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
        raise SystemExit(1)


# ---- Measuring ----


def drawn(folder: Path) -> Task:
    """The patches that all groups work on."""
    images = draw_images(folder, patches=PATCHES, size=SIZE, distinct=DISTINCT, quality=QUALITY, workers=available_cores())
    built = build_shards([images], folder / "shards", unlabelled=True, workers=1)
    (folder / "work").mkdir()
    return Task(str(images), str(built.out), str(folder / "work"), SECONDS)


def one_run(task: Task, result: Result) -> dict[str, Record]:
    """The ratios that could be measured; the reasons of the others are in the record."""
    found: dict[str, Record] = {}
    for group in dict.fromkeys(ratio.group for ratio in RATIOS.values()):
        mine = [name for name, ratio in RATIOS.items() if ratio.group == group]
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


def compare(found: Ratios, committed: Mapping[str, Any], why: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The ratios that are an error, and what there is to say. why: by name, for those that could not be measured."""
    failed, lines, known = [], [], committed["ratios"]
    for name in dict.fromkeys((*RATIOS, *known)):
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
    return failed, lines


def _elsewhere(committed: Mapping[str, Any]) -> str:
    here, there = machine(1)["cpu"], committed["machine"]["cpu"]
    return "" if here == there else f"; it was committed on another processor, {there}, and this is {here}"


def fell(now: float, was: float) -> bool:
    """Too far. NaN has fallen."""
    return not now >= (1 - FALL) * was


def committed_form(record: Record, found: Ratios, runs: int) -> Record:
    """What smoke.json holds."""
    return {
        "what": "Times of baselines over times of ours: more is better. benchmarks/smoke.py compares, and --update writes this.",
        "spread": "from the lowest to the highest run, as a share of the ratio (of a single run: of its rounds' middle half)",
        **{key: record[key] for key in ("date", "time", "commit", "command", "machine", "versions")},
        "runs": runs,
        "ratios": {
            name: {"ratio": _rounded(each["ratio"]), "spread": _rounded(each["spread"]), "rounds": each["rounds"]}
            | {"means": RATIOS[name].means}
            for name, each in found.items()
        },
    }


def _rounded(value: float) -> float:
    """To four digits."""
    return round(value, 3 - math.floor(math.log10(abs(value)))) if value else value


def table(found: Ratios, committed: Mapping[str, Any] | None) -> Table:
    known, rows = committed["ratios"] if committed else {}, []
    for name, each in found.items():
        was = known.get(name, {}).get("ratio")
        change = cell(None if was is None else each["ratio"] / was - 1, "+.1%")
        rows.append([name, f"{each['ratio']:.3g}", f"{each['spread']:.1%}", cell(was, ".3g"), change])
    return Table(["ratio", "measured", "spread", "committed", "change"], rows)


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
