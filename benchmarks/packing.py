"""How fast are patches packed, held against the decoder's own speed, tar, and the other tools, on the same files?

    python benchmarks/packing.py --work DISK/bench                                # 100,000 drawn patches of 224 px
    python benchmarks/packing.py --work DISK/bench --images data/breast --layout '{class}/{slide}/{magnification}/{name}'
    python benchmarks/packing.py --work DISK/bench --memory                       # peak memory by number of patches

All contenders run in turn, round by round (A B C A B C), each in a fresh process and with the images in the page cache. A
packer's time is what its user waits for: from the start of the process to its end, and then until its output is on the disk
(fsync of every file and folder). The bare decoders' time is that of decoding alone, so the yardstick is not short.

Results go to <out>/<date>-packing.json, written after every run, and at the end as a table to the same name's .md. A target
that was not reached is printed as MISSED.
"""

import functools
import importlib.util
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

from measuring import RunFailed, chosen, machine, new_path, print_table, record_of, take  # noqa: E402
from packing_contenders import CONTENDERS, Task  # noqa: E402
from packing_images import LAYOUT, draw_images, image_files  # noqa: E402
from packing_report import (  # noqa: E402
    judge,
    memory_markdown,
    memory_table,
    speed_lines,
    speed_markdown,
    speed_table,
    summarise,
    versions,
)
from packing_runs import note_peaks, one_run, output_folder, run_process  # noqa: E402

from sharding.cli import option, required, run_script  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import write_json, write_text  # noqa: E402

_QUALITY = {"speed": 85, "memory": 100}  # of the drawn JPEGs: 15 to 19 KB at 224 px, and 0.9 KB at 16 px
_TINY = 16  # pixels, side of the images for --memory


@dataclass(frozen=True)
class Config:
    """What is packed by whom, and where."""

    work: str = required("a folder on the disk to measure on: drawn images stay there, and outputs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    images: str | None = option(None, "a folder of real images to pack instead of drawn ones")
    layout: str = option(LAYOUT, "what a path below --images means to ours; the others take the first folder for the class")
    patches: int = option(100_000, "images to draw")
    distinct: int = option(1000, "different pictures among them; the others differ in a comment of their header")
    size: int = option(224, "side of the drawn images, pixels")
    rounds: int = option(3, "how often each contender runs")
    contenders: list[str] = option([], f"only these of {', '.join(CONTENDERS)} (default: all that are installed)")
    workers: int = option(0, "processes or threads of those that work in parallel (0: one per core)")
    memory: bool = option(False, "measure the peak memory of ours instead, with --check header, on tiny images")
    counts: list[int] = option([1000, 10_000, 100_000, 1_000_000], "for --memory: numbers of patches; the first is the base")


def main(config: Config) -> None:
    for name, least in (("rounds", 1), ("patches", 1), ("distinct", 1), ("size", 1), ("workers", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} {getattr(config, name)} is out of range: give at least {least}")
    workers = config.workers or available_cores()
    Path(config.work).mkdir(parents=True, exist_ok=True)
    path = new_path(Path(config.out), "packing-memory" if config.memory else "packing")
    record: dict[str, Any] = {
        **record_of(machine(workers), {}),
        "failed": {},
    }
    console = Console(highlight=False, soft_wrap=True)
    (measure_memory if config.memory else measure_speed)(config, workers, record, path, console)
    console.print(f"{path.with_suffix('.md')}")
    if failed := record["failed"]:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
        raise SystemExit(1)


# ---- Speed ----


def measure_speed(config: Config, workers: int, record: dict[str, Any], path: Path, console: Console) -> None:
    """Every contender in turn, round by round."""
    record["missing"] = missing = absent(chosen(config.contenders, CONTENDERS))
    names = [name for name in chosen(config.contenders, CONTENDERS) if name not in missing]
    for name, how in missing.items():
        console.print(f"{name}: {how}", markup=False)
    if config.images:
        images = Path(config.images)
        if not images.is_dir():
            raise ValueError(f"--images {images}: there is no such folder; give the one that holds a folder for each class")
    else:
        console.print(f"drawing {config.patches:,} images, unless they are there", markup=False)
        images = draw_images(
            Path(config.work),
            patches=config.patches,
            size=config.size,
            distinct=min(config.distinct, config.patches),
            quality=_QUALITY["speed"],
            workers=workers,
        )
    patches, size = read_once(images)
    record |= {
        "versions": versions(names),
        "images": {"patches": patches, "bytes": size, "drawn": not config.images},
        "runs": {name: [] for name in names},
    }
    console.print(f"{patches:,} images of {size / patches / 1e3:.1f} KB", markup=False)
    for number in range(1, config.rounds + 1):
        for name in names:
            measure = functools.partial(_one_speed, name, images.resolve(), config, workers, patches, size)
            take(
                record,
                name,
                f"round {number}: {name}",
                path,
                console,
                measure,
                lambda run: f"{run['patches_per_s']:,.0f} patches/s",
            )
    record["summary"] = summarise(record["runs"])
    record["targets"] = judge(record["summary"])
    write_json(path, record)
    write_text(path.with_suffix(".md"), speed_markdown(record))
    print_table(console, *speed_table(record))
    for line in speed_lines(record):
        console.print(line, markup=False)


def absent(names: Iterable[str]) -> dict[str, str]:
    """What is not installed, and how it would be."""
    found = {}
    for name in names:
        contender = CONTENDERS[name]
        if name == "tar":
            if not shutil.which("tar"):
                found[name] = "not installed: GNU tar"
        elif contender.module and not _is_installed(contender.module):
            found[name] = f"not installed: pip install {contender.package}"
    return found


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def read_once(images: Path) -> tuple[int, int]:
    """Read every image, so that all contenders find them in memory. Returns how many there are, and their bytes."""
    patches = size = 0
    for path, _ in image_files(images):
        with open(path, "rb", buffering=0) as file:
            size += len(file.read())
        patches += 1
    if not patches:
        raise ValueError(f"{images} holds no image in a folder of a class: give a folder that holds a folder for each class")
    return patches, size


def _one_speed(name: str, images: Path, config: Config, workers: int, patches: int, size: int) -> dict[str, float]:
    with output_folder(config.work) as out:
        return one_run(name, Task(str(images), str(out), workers, config.layout), patches, size)


# ---- Memory ----


def measure_memory(config: Config, workers: int, record: dict[str, Any], path: Path, console: Console) -> None:
    """Peak resident memory of our packer, in a fresh process for each number of patches."""
    counts = sorted(set(config.counts))
    if len(counts) < 2 or counts[0] < 1:
        raise ValueError("--counts needs at least two numbers of patches: the least is the base of the others")
    record |= {"versions": versions(["ours-header"]), "memory": []}
    for count in counts:
        console.print(f"{count:,} patches: drawing them, unless they are there, and packing", markup=False)
        images = draw_images(
            Path(config.work),
            patches=count,
            size=_TINY,
            distinct=min(config.distinct, counts[0]),
            quality=_QUALITY["memory"],
            workers=workers,
        )
        try:
            with output_folder(config.work) as out:
                record["memory"].append(_one_peak(Task(str(images.resolve()), str(out), workers, LAYOUT), count))
        except RunFailed as error:
            record["failed"][f"{count:,} patches"] = str(error)
            console.print(f"FAILED: {error}", markup=False)
            break
        finally:
            write_json(path, record)
    write_text(path.with_suffix(".md"), memory_markdown(record))
    print_table(console, *memory_table(record["memory"]))


def _one_peak(task: Task, count: int) -> dict[str, float]:
    """Peaks in bytes. Raises RunFailed."""
    patches, size = read_once(Path(task.images))
    peaks: dict[int, int] = {}
    started = time.perf_counter()
    report = run_process("ours-header", task, watch=lambda root: note_peaks(root, peaks))
    wall = time.perf_counter() - started
    if not report["patches"] == patches == count:
        raise RunFailed(f"{report['patches']:,} of {count:,} patches are there")
    return {
        "patches": count,
        "image_bytes": size / count,
        "parent_bytes": report["peak_bytes"],  # its own last word, which no look from outside can miss
        "child_bytes": max((peak for process, peak in peaks.items() if process != report["process"]), default=0),
        "wall_s": wall,
    }


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="packing.py", description=(__doc__ or "").splitlines()[0]))
