"""The log that rank 0 writes during training: metrics.jsonl and TensorBoard, with throughput."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines.loader import ViewLoader
from train.records.json_files import write_json, write_text
from train.records.retry import RETRY_TIMEOUT_S, retry_io
from train.records.runs import Run


class MetricsLogger:
    """metrics.jsonl and TensorBoard. Rows after the step that a run resumes from are removed: they will be written again.

    init_lines: what was done with the initial weights; engine: how the steps are computed (both are kept as JSON). on_row: called
    with each row. retry_timeout_s: how long to retry if storage fails; training continues meanwhile.
    """

    def __init__(
        self,
        run: Run,
        step: int,
        init_lines: list[str],
        engine: dict[str, Any],
        on_row: Callable[[dict[str, float]], None] | None = None,
        *,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
    ):
        path = run.folder / "metrics.jsonl"

        def begin() -> None:
            kept = [row for row in run.metrics() if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            write_json(run.folder / "init.json", init_lines)
            write_json(run.folder / "engine.json", engine)

        retry_io(begin, run.folder, timeout_s=retry_timeout_s)
        self._lines = Lines(path, retry_timeout_s)
        self._tensorboard = _TensorBoard(run, step)
        self._on_row = on_row

    def write(self, row: dict[str, float]) -> None:
        """Append a row; NaN becomes null.

        Raises ValueError when the rows could not be written for too long.
        """
        self._lines.append(json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n")
        if not self._lines.waiting:  # or the disk has no room for the other either
            self._tensorboard.add(row)
        else:
            self._tensorboard.give_up()
        if self._on_row:
            self._on_row(row)

    def close(self) -> None:
        """Write what waits, and end TensorBoard's thread. Raises ValueError as `write` does."""
        try:
            self._lines.close()
        finally:
            self._tensorboard.close()


class Lines:
    """A file that lines are appended to. Lines that cannot be written are kept in memory and written with the next one.

    Raises ValueError after the retry time-out.
    """

    def __init__(self, path: Path, retry_timeout_s: float):
        self._path, self._retry_timeout_s = path, retry_timeout_s
        self._file = retry_io(lambda: path.open("r+b", buffering=0), path, timeout_s=retry_timeout_s)
        self._written = os.fstat(self._file.fileno()).st_size
        self._waiting = b""
        self._failing_since: float | None = None

    def append(self, line: str) -> None:
        """Write the line, after those that wait."""
        self._waiting += line.encode()
        try:
            self._write()
        except OSError as error:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            if now - self._failing_since >= self._retry_timeout_s:
                raise ValueError(
                    f"{self._path}: could not be written for {self._retry_timeout_s:.0f} s ({error.strerror}): free space and"
                    " run the same command again to resume from the newest checkpoint"
                ) from error
        else:
            self._failing_since = None

    @property
    def waiting(self) -> bool:
        """Whether lines could not be written yet."""
        return bool(self._waiting)

    def close(self) -> None:
        """Write what waits, and close the file."""
        with self._file:
            retry_io(self._write, self._path, timeout_s=self._retry_timeout_s)

    def _write(self):
        while self._waiting:
            # At its place, so that a part of a line that a full disk still took is written over.
            done = os.pwrite(self._file.fileno(), self._waiting, self._written)
            self._written, self._waiting = self._written + done, self._waiting[done:]


class _TensorBoard:
    """TensorBoard's copy of the rows. Where its writer fails, a new one begins with all of metrics.jsonl, as soon as it can."""

    def __init__(self, run: Run, step: int):
        self._run = run
        self._writer: Any = None
        self._open(step + 1 if step else None)

    def add(self, row: dict[str, float]) -> None:
        """Add a row's values, and those of all rows before if they are not there."""
        if self._writer is None:
            self._begin_anew()
            return
        try:
            self._add(row)
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        """End this writer; the next row begins a new one."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Write all, if it can be, and end the writer's thread."""
        if self._writer is None:
            self._begin_anew()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                print(
                    f"{self._run.name}: TensorBoard's file could not be written ({error}); metrics.jsonl is complete", flush=True
                )

    def _add(self, row):
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, float("nan") if value is None else value, int(row["step"]))

    def _begin_anew(self):
        self._open(0)  # what other files have from step 0 on no longer counts
        try:
            for row in self._run.metrics() if self._writer else []:
                self._add(row)
        except OSError:
            self.give_up()

    def _open(self, purge_step):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        with contextlib.suppress(OSError):
            self._writer = SummaryWriter(str(self._run.folder / "tensorboard"), purge_step=purge_step)


def write_scalars(run: Run, scalars: dict[str, dict[int, float]]) -> None:
    """Add them to the run's TensorBoard, each a value by step."""
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.closing(SummaryWriter(str(run.folder / "tensorboard"))) as board:
        for name, values in scalars.items():
            for step, value in values.items():
                board.add_scalar(name, value, step)


class Clock:
    """Speed since it was made. patches: trained on since, by all workers; to be counted up."""

    def __init__(self, loader: ViewLoader):
        self._loader, self._waited, self._started = loader, loader.wait_seconds, time.perf_counter()
        self.patches = 0

    def read(self, device: torch.device) -> dict[str, float]:
        """patches_per_s; images_per_s, that is views; data_wait, the share of time spent waiting for data, 0 to 1;
        gpu_memory_gib, the peak tensor memory so far, if there is a GPU."""
        seconds = time.perf_counter() - self._started
        rate = self.patches / seconds
        found = {
            "patches_per_s": round(rate, 2),
            "images_per_s": round(rate * self._loader.recipe.views, 2),
            "data_wait": round((self._loader.wait_seconds - self._waited) / seconds, 4),
        }
        if device.type == "cuda":
            found["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        return found
