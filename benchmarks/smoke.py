"""Is something of ours slower than it was? Ratios to yardsticks that our code does not change, against those committed.

    python benchmarks/smoke.py                      # make bench-smoke: under 3 minutes on 2 cores
    python benchmarks/smoke.py --update             # measure three times and write smoke.json
    python benchmarks/smoke.py --update --runs 20 --out benchmarks/results     # and how far they move by chance

No absolute time is compared: a ratio is the time of a yardstick (torchvision on Pillow, DALI's bare decoder, the plain formula,
...) over ours. Yardsticks and ours run in turn on one core (A B A B), each group of them in a fresh process, and the ratio is the
median of the ratios within a round. What is timed is CPU time, so that others' work on the machine matters little.

A ratio that fell by more than 20 % below benchmarks/smoke.json is named with both figures, and then the exit code is 1; so it is
where one that is committed could not be measured. On another kind of processor the ratios are others: write the file there
first, at a commit that you trust. Write it while the machine is quiet: on a busy one the yardsticks of many small steps lose more
than ours do, so that ratios rise by up to a sixth.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

import smoke_sides  # noqa: E402
from measuring import RunFailed, machine, new_path, print_table, record_of, run_fresh, versions_of  # noqa: E402
from packing_images import draw_images  # noqa: E402
from smoke_report import Verdict, committed_form, compare, falls, markdown, of_rounds, summarise, table  # noqa: E402
from smoke_sides import DISTINCT, PATCHES, QUALITY, RATIOS, SIZE, Ratio, Task  # noqa: E402

from sharding.cli import option, run_script  # noqa: E402
from sharding.packing import build_shards  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import read_json, write_json, write_text  # noqa: E402

COMMITTED = ROOT / "benchmarks" / "smoke.json"
_LIMIT_S = 900  # of a group: one that hangs, not a busy machine
_UPDATE_RUNS = 3
_PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "numba", "numpy", "pyarrow", "timm")


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
    wanted = _wanted(config)
    committed = None if config.update else read_json(COMMITTED, "--update writes it")
    console = Console(highlight=False, soft_wrap=True)
    path = new_path(Path(config.out), "smoke") if config.out else None
    record: dict[str, Any] = {
        **record_of(machine(1), versions_of(_PACKAGES)),
        "seconds": config.seconds,
        "runs": [],
        "wall_s": [],
        "failed": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"drawing {PATCHES:,} patches and packing them")
        task = drawn(Path(folder), config.seconds)
        for number in range(1, runs + 1):
            began = time.monotonic()
            record["runs"].append(one_run(wanted, task, Path(folder), record["failed"], console))
            record["wall_s"].append(round(time.monotonic() - began, 1))
            console.print(f"run {number} of {runs}: {record['wall_s'][-1]:.0f} s")
            if path:
                write_json(path, record)
    found = summarise(record["runs"])
    if config.update:
        verdicts = [Verdict(name, f"{name}: not measured: {why}", True) for name, why in record["failed"].items()]
        if not verdicts:
            committed = committed_form(record, found)
            write_json(COMMITTED, committed)
            console.print(f"{COMMITTED}")
    else:
        assert committed is not None
        verdicts = compare(found, committed, wanted, record["failed"])
    print_table(console, *table(found, committed))
    if path:
        record["ratios"] = found
        record["falls"] = falls(record["runs"], committed) if committed else {}
        write_json(path, record)
        write_text(path.with_suffix(".md"), markdown(record, committed))
        console.print(f"{path.with_suffix('.md')}")
    for verdict in verdicts:
        console.print(verdict.text, markup=False)
    if failed := [verdict.name for verdict in verdicts if verdict.failed]:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def _wanted(config: Config) -> dict[str, Ratio]:
    if unknown := [name for name in config.only if name not in RATIOS]:
        raise ValueError(f"there is no ratio {unknown[0]!r}: choose of {', '.join(RATIOS)}")
    if config.only and config.update:
        raise ValueError("--only and --update: smoke.json holds all ratios of one commit; leave one out")
    return {name: ratio for name, ratio in RATIOS.items() if not config.only or name in config.only}


# ---- Measuring ----


def drawn(folder: Path, seconds: float) -> Task:
    """The patches that all groups work on."""
    images = draw_images(folder, patches=PATCHES, size=SIZE, distinct=DISTINCT, quality=QUALITY, workers=available_cores())
    built = build_shards([images], folder / "shards", unlabelled=True, workers=1)
    (folder / "work").mkdir()
    return Task(str(images), str(built.out), str(folder / "work"), seconds)


def one_run(
    wanted: Mapping[str, Ratio], task: Task, folder: Path, failed: dict[str, str], console: Console
) -> dict[str, dict[str, Any]]:
    """Each ratio's median over the rounds, their number, and how far their middle half reaches, as a share of the median. One
    whose group failed is missing, and the reason is in `failed`."""
    found: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(ratio.group for ratio in wanted.values()):
        mine = {name: ratio for name, ratio in wanted.items() if ratio.group == group}
        try:
            times = measured(group, task, folder)
        except RunFailed as error:  # the others' figures are worth having; the exit code tells
            failed |= dict.fromkeys(mine, str(error))
            console.print(f"{group}: FAILED: {error}", markup=False)
            continue
        for name, ratio in mine.items():
            found[name] = of_rounds(times[ratio.yardstick], times[ratio.ours])
            console.print(f"{name}: {found[name]['ratio']:.3g} over {found[name]['rounds']} rounds", markup=False)
    return found


def measured(group: str, task: Task, folder: Path) -> dict[str, list[float]]:
    """CPU seconds of the group's sides, round by round, from a fresh process. Raises RunFailed."""
    until, result = time.monotonic() + _LIMIT_S, folder / "result.json"

    def watch(_: int) -> None:
        if time.monotonic() > until:
            raise RunFailed(f"not done after {_LIMIT_S} s")

    result.unlink(missing_ok=True)
    threads = [f"{variable}=1" for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
    command = [sys.executable, str(smoke_sides.__file__), group, json.dumps(dataclasses.asdict(task)), str(result)]
    run_fresh(["env", *threads, *command], folder / "run.log", watch)  # libraries read them when they are loaded
    return json.loads(result.read_text())


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="smoke.py", description=(__doc__ or "").splitlines()[0]))
