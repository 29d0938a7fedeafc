"""What the check of the cost model measures beside one and two real workers, each in a process of its own."""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import Contender, own_memory

BACKBONE, IMAGE_SIZE, PART, DIM = "resnet18", 64, 32, 128  # PART: patches of a worker in a step
LIMIT_S = 600.0  # for a run that hangs
_TIMED = 4  # exchanges, and steps, of which the median counts
_BUCKET = 25 * 2**20  # bytes that DistributedDataParallel reduces at a time


@dataclasses.dataclass(frozen=True)
class Task:
    shards: str = ""
    work: str = ""
    rows: int = 0


def exchange(task: Task) -> dict[str, Any]:
    """Of two processes of one thread each, joined by gloo: reduce_s, of the model's gradients; gather_s, of the embeddings and
    their gradients; hop_s, of a single number; alone_s and together_s, a step without exchange of one model, and of each of two
    at a time; slowdown, together_s / alone_s."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_exchange_rank, (folder,), nprocs=2)
        return json.loads((Path(folder) / "found.json").read_text())


def _exchange_rank(rank: int, folder: str) -> None:
    import datetime

    import torch
    import torch.distributed as dist
    from step_model import model_step

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    training = model_step(backbone=BACKBONE, image_size=IMAGE_SIZE, batch_size=PART, device="cpu", precision="fp32")
    parameters = sum(each.numel() for each in training.net.parameters())
    buckets = torch.ones(parameters).split(_BUCKET // 4)
    z_MD, z_ND = torch.ones(2 * PART, DIM), torch.ones(4 * PART, DIM)
    word = torch.ones(1)

    def reduce() -> None:
        for bucket in buckets:
            dist.all_reduce(bucket)

    def gather() -> None:
        dist.all_gather_into_tensor(z_ND, z_MD)
        dist.reduce_scatter_tensor(z_MD, z_ND)

    found: dict[str, Any] = {"parameters": parameters}
    found["reduce_s"] = _median_seconds(reduce, dist.barrier)
    found["gather_s"] = _median_seconds(gather, dist.barrier)
    found["hop_s"] = _median_seconds(lambda: dist.all_reduce(word), dist.barrier) / 2  # an all-reduce is two collectives
    alone, together = [], []
    for _ in range(2):  # in turn, so that a slow minute of the machine cancels out
        if rank == 0:
            alone.append(_median_seconds(training.step, lambda: None))
        dist.barrier()
        together.append(_median_seconds(training.step, lambda: None))
        dist.barrier()
    if rank == 0:
        found |= {"alone_s": statistics.median(alone), "together_s": statistics.median(together)}
        found["slowdown"] = found["together_s"] / found["alone_s"]
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _median_seconds(work: Callable[[], Any], before: Callable[[], Any]) -> float:
    times = []
    for number in range(_TIMED + 2):
        before()
        started = time.perf_counter()
        work()
        if number >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def write(task: Task) -> dict[str, Any]:
    """A set of so many patches, unless it is there."""
    from large_manifest import Config, write_large_set

    write_large_set(Config(data=task.shards, work=task.work, rows=task.rows))
    return {}


def rank(task: Task) -> dict[str, Any]:
    """What a rank takes to open the large set and to read its first batches."""
    from large_manifest import Config, measured

    return measured(Config(data=task.shards, work=task.work, rows=task.rows))


def driver(task: Task) -> dict[str, Any]:
    """The peak memory of a process that selects all patches of a set, as the driver of a pretraining does."""
    from pipelines.shard_reader import ShardReader
    from sharding.selection import select

    select(ShardReader(task.work).manifest, split="train", fraction=1.0, seed=1)
    return {"peak_bytes": own_memory("VmHWM")}


CONTENDERS = {
    "exchange": Contender("two workers' exchange", exchange),
    "write": Contender("a large manifest", write),
    "rank": Contender("a rank", rank),
    "driver": Contender("the driver", driver),
}
