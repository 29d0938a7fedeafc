"""torch's profiler on a few steps after warm-up: a trace for chrome://tracing or ui.perfetto.dev."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

TRACE_NAME = "trace.json.gz"
# Of the steps since the start: the first are slow (memory, autotuning, compiling), and so is the profiler's own start.
SKIPPED, WARM_UP, TRACED = 8, 2, 4


@contextlib.contextmanager
def tracing(folder: Path | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """A block that calls the given function after each step, so that a few of them are traced into folder/trace.json.gz.

    folder: None traces nothing. A block of no more than SKIPPED + WARM_UP steps leaves no trace.
    """
    if folder is None:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def write(profiler: torch.profiler.profile) -> None:
        if profiler.step_num == SKIPPED + WARM_UP:  # the run ended right there
            return
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE_NAME))

    schedule = torch.profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=TRACED, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
