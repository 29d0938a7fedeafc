"""Runs one contender in a fresh process: python worker.py MODULE NAME TASK RESULT.

MODULE has CONTENDERS and a dataclass Task. TASK is a task as JSON; what the contender returns goes to RESULT as JSON.
Only the standard library is imported before the contender's own module: the start of the process is part of some measurements.
"""

import dataclasses
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    run: (task) -> its measurements as plain data; None for a program of its own. needs: modules that it imports and that may be
    missing; package: what pip calls them. devices: where it runs by default. pinned: whether its process is bound to the first
    `task.cores` cores.
    """

    title: str
    run: Callable[[Any], dict[str, Any]] | None
    needs: tuple[str, ...] = ()
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    pinned: bool = True


def own_memory(field: str) -> int:
    """Bytes of this process by /proc/self/status, such as VmRSS (now) or VmHWM (the peak).

    Not by getrusage: a process that was started by a large one begins with that one's peak.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def synchronize(device: str) -> None:
    """Wait for all work on the GPU, on any stream."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def steady_state(
    batches: Iterator, use: Callable[[Any], Any], *, warm: int, lap: int, seconds: float, device: str
) -> tuple[int, float, float]:
    """How many batches were used, the seconds that this took, and those of them spent waiting for the next batch.

    warm: batches that are used before the clock starts; lap: batches at a time, until at least `seconds` have passed.
    """
    for batch in itertools.islice(batches, warm):
        use(batch)
    synchronize(device)
    count, waited, started = 0, 0.0, time.perf_counter()
    while not count or time.perf_counter() - started < seconds:
        for _ in range(lap):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            use(batch)
            count += 1
    synchronize(device)
    return count, time.perf_counter() - started, waited


def main(module: str, name: str, given: str, result: str) -> None:
    loaded = importlib.import_module(module)
    contender, task = loaded.CONTENDERS[name], loaded.Task(**json.loads(given))
    if contender.pinned and getattr(task, "cores", 0):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.cores])
    Path(result).write_text(json.dumps(contender.run(task)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
