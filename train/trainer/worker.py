"""One of the processes that train a run together: its rank, its device, and where the run is kept."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sharding.cli import describe
from train.records.checkpoints import CheckpointStore
from train.records.remote_run import CHECKPOINT_NAME
from train.records.retry import retry_io


class Worker:
    """device: None is a GPU if there is one. group: of all ranks; None for one process."""

    def __init__(
        self,
        store: CheckpointStore,
        device: torch.device | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
    ):
        self.store, self.rank, self.world_size, self.group = store, rank, world_size, group
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def is_main(self) -> bool:
        """Whether it is rank 0, which logs, evaluates and saves."""
        return self.rank == 0

    def retry(self, write: Callable[[], None], place: Path) -> None:
        """Call what writes to a place, again while its storage fails. Raises ValueError where it fails for too long."""
        retry_io(write, place, timeout_s=self.store.retry_timeout_s)

    def mean(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """The mean over ranks of each scalar."""
        stacked = torch.stack([value.double() for value in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked, group=self.group)
            stacked /= self.world_size
        return dict(zip(values, stacked.tolist(), strict=True))

    def broadcast(self, value: Any) -> Any:
        """What rank 0 has, on every rank: plain data."""
        found = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(found, src=0, group=self.group, device=self.device)
        return found[0]

    def union(self, values: set[int]) -> set[int]:
        """The values of all ranks together."""
        found: list[Any] = [values]
        if self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, values, group=self.group)
        return set().union(*found)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state in the newest checkpoint, or None. Rank 0 chooses: others may see a shared folder as it was
        a moment ago."""
        name = self.broadcast(self.store.newest() if self.is_main else None)
        if name is None:
            return None
        path = self.store.fetch(name) / CHECKPOINT_NAME
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"a {type(state).__name__}")
        except torch.OutOfMemoryError:
            raise
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError, KeyError) as error:
            raise damaged_checkpoint(path, error) from error
        return state | {"path": path}


def damaged_checkpoint(path: Path, error: BaseException) -> ValueError:
    """The error for a checkpoint that cannot be read, or is of another run."""
    reason = describe(error).split(". ")[0][:200]
    return ValueError(
        f"{path} is damaged, or no checkpoint of this run ({reason}): restore it, or remove {path.parent}, and the same command"
        " trains from the beginning"
    )


def single_worker(folder: Path, device: torch.device | None = None, **store: Any) -> Worker:
    """The only worker of a run in this folder. store: further arguments of CheckpointStore."""
    return Worker(CheckpointStore(folder, **store), device)
