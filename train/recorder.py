"""What rank 0 leaves of a run while it goes: metrics.jsonl, TensorBoard, and how fast it is."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from pipelines.loader import ViewLoader
from train.runs import Run, write_json, write_text


class Recorder:
    """metrics.jsonl and TensorBoard. Rows after the step that a run goes on from are taken away: they come again.

    init_lines: what was done with the initial weights; engine: how the steps are computed (both are kept as JSON). tell: who else
    is given each row, as it is.
    """

    def __init__(
        self,
        run: Run,
        step: int,
        init_lines: list[str],
        engine: dict[str, Any],
        tell: Callable[[dict[str, float]], None] | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        path = run.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
        write_json(run.folder / "init.json", init_lines)
        write_json(run.folder / "engine.json", engine)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1 if step else None)
        self._tell = tell

    def write(self, row: dict[str, float]) -> None:
        """Append a row; a value that is no number (NaN) becomes null."""
        self._file.write(json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n")
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))
        if self._tell:
            self._tell(row)

    def close(self) -> None:
        """Flush both, and end TensorBoard's thread."""
        self._file.close()
        self._board.close()


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
        gpu_memory_gib, the most that tensors took so far, where there is a GPU."""
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
