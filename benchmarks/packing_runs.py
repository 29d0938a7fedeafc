"""One contender in a fresh process: its time until its output is on the disk, and the memory of all its processes."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import RunFailed, run_fresh
from packing_contenders import CONTENDERS, DECODERS, Task, command


@contextmanager
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


def one_run(name: str, task: Task, patches: int, size: int) -> dict[str, float]:
    """Seconds and patches/s of one contender in a fresh process. patches, size: what it was given; size in bytes.

    start_s: of Python, its imports and its end; work_s: after the imports; sync_s: afterwards, until the output is on the disk.
    counted_s: what the rate is of. Raises RunFailed.
    """
    load = os.getloadavg()[0]
    started = time.perf_counter()
    report = run_process(name, task)
    wall = time.perf_counter() - started
    sync = sync_tree(Path(task.out))
    if report.get("patches", patches) != patches:
        raise RunFailed(f"{report['patches']:,} of {patches:,} patches are there")
    work = report.get("work_s", wall)
    if name in DECODERS:
        counted = work
    else:
        counted = wall + sync
        if tree_bytes(Path(task.out)) < size:
            raise RunFailed("the output is smaller than the images")
    return {
        "patches_per_s": patches / counted,
        "counted_s": counted,
        "start_s": wall - work,
        "work_s": work,
        "sync_s": sync,
        "load_before": load,
    }


def run_process(name: str, task: Task, watch: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Run a contender to its end; what it reports. watch: called with its process id, again and again. Raises RunFailed."""
    result, log = Path(task.out).with_name("result.json"), Path(task.out).with_name("contender.log")
    result.unlink(missing_ok=True)
    run_fresh(command(name, task, result), log, watch)
    return json.loads(result.read_text()) if CONTENDERS[name].run else {}


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


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def note_peaks(root: int, peaks: dict[int, int]) -> None:
    """Write down the peak memory so far, in bytes, of the process `root` and of all that descend from it."""
    parents, seen = {}, {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            status = Path(f"/proc/{entry}/status").read_text(errors="replace")
        except OSError:  # it has just ended
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "VmHWM" in fields:  # neither the kernel's own nor one that has ended
            parents[int(entry)] = int(fields["PPid"])
            seen[int(entry)] = int(fields["VmHWM"].split()[0]) * 1024
    for process in seen:
        ancestor = process
        while ancestor != root and ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor == root:
            peaks[process] = max(peaks.get(process, 0), seen[process])
