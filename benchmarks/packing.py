"""How fast are patches packed, compared with the decoder's own speed, tar, and other tools, on the same files?

    python benchmarks/packing.py --work DISK/bench                                # 100,000 drawn patches of 224 px
    python benchmarks/packing.py --work DISK/bench --memory                       # peak memory by number of patches

A packer's time is what its user waits for: from the start of the process to its end, and then until its output is on the disk
(fsync of every file and folder). The bare decoders' time is that of decoding alone, so that the baseline is not too slow.

Results: <out>/<date>-packing.json and .md, with --memory <date>-packing-memory.
"""

import contextlib
import functools
import glob
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from contenders.packing import CONTENDERS, DECODERS, Task
from drawn_images import draw_images, image_files
from harness import Result, RunFailed, absent, check_at_least, chosen, run_contender, run_fresh, script
from report import Record, Report, Table, Target, judge, medians, missing_lines, rounds_table, summarise, target_lines

from sharding.cli import option, required
from sharding.process_pool import available_cores

_QUALITY = 85  # of the drawn JPEGs: 15 to 19 KB at 224 px
_TINY, _TINY_QUALITY = 16, 100  # side in pixels and quality of the images for --memory: 0.9 KB
_PACKAGES = ("numpy", "pyarrow", "pillow", *(each.package for each in CONTENDERS.values() if each.package))
TARGETS = (
    Target("ours-decode", "rate_to_decode", 0.8, "ours with --check decode, as a share of the bare decode's rate"),
    Target("ours-header", "time_to_tar", 3.0, "ours with --check header, its time as a multiple of tar's", at_least=False),
    Target("ours-header", "rate_to_webdataset", 5.0, "ours with --check header, its rate as a multiple of ShardWriter's"),
)


@dataclass(frozen=True)
class Config:
    """What is packed by whom, and where."""

    work: str = required("a folder on the disk to measure on: drawn images stay there, and outputs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    patches: int = option(100_000, "images to draw")
    distinct: int = option(1000, "different pictures among them; the others differ in a comment of their header")
    size: int = option(224, "side of the drawn images, pixels")
    rounds: int = option(3, "how often each contender runs")
    contenders: list[str] = option([], f"only these of {', '.join(CONTENDERS)} (default: all that are installed)")
    workers: int = option(0, "processes or threads of those that work in parallel (0: one per core)")
    memory: bool = option(False, "measure the peak memory of ours instead, with --check header, on tiny images")
    counts: list[int] = option([1000, 10_000, 100_000, 1_000_000], "for --memory: numbers of patches; the first is the base")


def main(config: Config) -> None:
    check_at_least(config, rounds=1, patches=1, distinct=1, size=1, workers=0)
    names = chosen(config.contenders, CONTENDERS)
    if config.memory and (len(set(config.counts)) < 2 or min(config.counts) < 1):
        raise ValueError("--counts needs at least two numbers of patches: the least is the base of the others")
    workers = config.workers or available_cores()
    Path(config.work).mkdir(parents=True, exist_ok=True)
    result = Result(config.out, "packing-memory" if config.memory else "packing", _PACKAGES, cores=workers)
    if config.memory:
        measure_memory(config, workers, result)
    else:
        measure_speed(config, workers, names, result)


# ---- Speed ----


def measure_speed(config: Config, workers: int, names: list[str], result: Result) -> None:
    missing = absent(CONTENDERS, names)
    if "tar" in names and not shutil.which("tar"):
        missing["tar"] = "not installed: GNU tar"
    names = result.leave_out(missing, names)
    result.say(f"drawing {config.patches:,} images, unless they are there")
    sizes = {"patches": config.patches, "size": config.size, "distinct": min(config.distinct, config.patches)}
    images = draw_images(Path(config.work), quality=_QUALITY, workers=workers, **sizes)
    patches, size = config.patches, read_once(images)
    result.record["images"] = {"patches": patches, "bytes": size}
    if "tar" in names:
        said = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True).stdout
        result.record["versions"]["tar"] = said.splitlines()[0].removeprefix("tar ")
    result.say(f"{patches:,} images of {size / patches / 1e3:.1f} KB")

    def measure(name: str) -> Record:
        with output_folder(config.work) as out:
            return one_run(name, Task(str(images.resolve()), str(out), workers), patches, size)

    result.rounds(names, config.rounds, measure, lambda run: f"{run['patches_per_s']:,.0f} patches/s")
    result.finish(speed_report(result.record))


def read_once(images: Path) -> int:
    """Read every image, so that all contenders find them in memory. Returns their bytes."""
    return sum(len(Path(path).read_bytes()) for path, _ in image_files(images))


@contextlib.contextmanager
def output_folder(work: str) -> Iterator[Path]:
    """An empty folder, removed at the end. Nothing that was written before waits for the disk while a contender runs."""
    out = Path(work).resolve() / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()
    try:
        yield out
    finally:
        shutil.rmtree(out)


def one_run(name: str, task: Task, patches: int, size: int) -> Record:
    """patches, size: what it was given; size in bytes. counted_s: what the rate is of; start_s: Python, its imports, its end;
    work_s: after the imports; sync_s: afterwards, until the output is on the disk. Raises RunFailed."""
    load = os.getloadavg()[0]
    started = time.perf_counter()
    report = run_process(name, task)
    wall = time.perf_counter() - started
    sync = sync_tree(Path(task.out))
    if report.get("patches", patches) != patches:
        raise RunFailed(f"{report['patches']:,} of {patches:,} patches are there")
    work = report.get("work_s", wall)
    if name not in DECODERS and sum(path.stat().st_size for path in Path(task.out).rglob("*") if path.is_file()) < size:
        raise RunFailed("the output is smaller than the images")
    counted = work if name in DECODERS else wall + sync
    found = {"patches_per_s": patches / counted, "counted_s": counted, "start_s": wall - work, "work_s": work}
    return found | {"sync_s": sync, "load_before": load}


def run_process(name: str, task: Task, watch: Callable[[int], None] | None = None) -> Record:
    """Run a contender to its end; what it reports. watch: called with its process id, again and again. Raises RunFailed."""
    if name == "tar":
        run_fresh(["tar", "-C", task.images, "-cf", f"{task.out}/images.tar", "."], Path(task.out).with_name("tar.log"))
        return {}
    return run_contender("contenders.packing", name, task, watch=watch)


def sync_tree(folder: Path) -> float:
    """Seconds until every file and folder below is on the disk."""
    started = time.perf_counter()
    for place, _, names in os.walk(folder):
        for path in (*(os.path.join(place, name) for name in names), place):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    return time.perf_counter() - started


def summary_of(runs: dict[str, list[Record]]) -> Record:
    """The bare decode is the faster of its two, by their medians."""
    rates = {name: medians(found, "patches_per_s")["patches_per_s"] for name, found in runs.items() if found}
    decode = max((name for name in DECODERS if name in rates), key=lambda name: rates[name], default="")
    ratios = {"rate_to_decode": (decode, "patches_per_s")}
    ratios |= {"time_to_tar": ("tar", "counted_s"), "rate_to_webdataset": ("webdataset", "patches_per_s")}
    found = summarise(runs, "patches_per_s", "counted_s", "start_s", "sync_s", ratios=ratios)
    for name in found.keys() & set(DECODERS):
        found[name] |= {"time_to_tar": None, "rate_to_webdataset": None}  # it writes nothing
    return found


def speed_report(record: Record) -> Report:
    summary = summary_of(record["runs"])
    record = record | {"summary": summary, "targets": judge(summary, TARGETS)}
    images = record["images"]
    columns = {"counted s": "counted_s", "start s": "start_s", "sync s": "sync_s", "rate / bare decode": "rate_to_decode"}
    columns |= {"time / tar": "time_to_tar", "rate / ShardWriter": "rate_to_webdataset"}
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    text = (
        f"{images['patches']:,} drawn images of {images['bytes'] / images['patches']:,.0f} bytes on average, in the page cache."
        " Patches/s, a fresh process each time, the rounds interleaved. A packer's time runs from the start of its process,"
        " imports included, until its output is synced to disk; a bare decode's time is that of decoding alone. Ratios are"
        " medians of the ratios within a round."
    )
    shown = {title: (key, ".2f") for title, key in columns.items()}
    table = rounds_table(record, titles, "patches_per_s", "patches/s", shown)
    return Report(record, "Packing", [text, table, *target_lines(record), *missing_lines(record, CONTENDERS)])


# ---- Memory ----


def measure_memory(config: Config, workers: int, result: Result) -> None:
    """Peak resident memory of our packer, in a fresh process for each number of patches."""
    counts = sorted(set(config.counts))
    rows = result.record["memory"] = []
    for count in counts:
        result.say(f"{count:,} patches: drawing them, unless they are there, and packing")
        sizes = {"patches": count, "size": _TINY, "distinct": min(config.distinct, counts[0])}
        images = draw_images(Path(config.work), quality=_TINY_QUALITY, workers=workers, **sizes)
        with output_folder(config.work) as out:
            job = functools.partial(one_peak, Task(str(images.resolve()), str(out), workers), count)
            result.note(rows, f"{count:,} patches", job, lambda row: f"{row['wall_s']:.1f} s")
    result.finish(memory_report(result.record))


def one_peak(task: Task, count: int) -> Record:
    """Peaks in bytes. Raises RunFailed."""
    size = read_once(Path(task.images))
    peaks: dict[int, int] = {}
    started = time.perf_counter()
    report = run_process("ours-header", task, watch=lambda root: note_peaks(root, peaks))
    wall = time.perf_counter() - started
    if report["patches"] != count:
        raise RunFailed(f"{report['patches']:,} of {count:,} patches are there")
    return {
        "patches": count,
        "image_bytes": size / count,
        "parent_bytes": report["peak_bytes"],  # its own last word, which no look from outside can miss
        "child_bytes": max((peak for process, peak in peaks.items() if process != report["process"]), default=0),
        "wall_s": wall,
    }


def note_peaks(process: int, peaks: dict[int, int]) -> None:
    """Update the peak memory so far, in bytes, of a process and of all its descendants."""
    with contextlib.suppress(OSError):  # it has just ended
        for line in Path(f"/proc/{process}/status").read_text(errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                peaks[process] = max(peaks.get(process, 0), int(line.split()[1]) * 1024)
        for children in glob.glob(f"/proc/{process}/task/*/children"):
            for child in Path(children).read_text().split():
                note_peaks(int(child), peaks)


def memory_report(record: Record) -> Report:
    """Bytes per patch are the growth since the first row, over the patches more than there; "-" where that had no child."""
    rows = []
    for row in record["memory"]:
        first = record["memory"][0]
        more = row["patches"] - first["patches"]
        cells = [f"{row['patches']:,}", f"{row['image_bytes']:,.0f}"]
        for name in ("parent_bytes", "child_bytes"):
            growth = f"{(row[name] - first[name]) / more:,.0f}" if more and first[name] else "-"
            cells += [f"{row[name] / 1e6:,.1f}", growth]
        rows.append([*cells, f"{row['wall_s']:.1f}"])
    header = ["patches", "bytes each", "parent, MB", "its bytes per patch", "largest child, MB", "its bytes per patch", "s"]
    text = (
        "Peak resident memory (VmHWM; MB are 10^6 bytes) of ours with --check header: of the process that packs, and of its"
        " largest child. Bytes per patch are the growth since the first row."
    )
    failed = [f"- FAILED: {what}: {why}" for what, why in record["failed"].items()]
    return Report(record, "Memory of packing", [text, Table(header, rows), *failed])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
