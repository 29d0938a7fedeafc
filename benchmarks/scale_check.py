"""scale.py --check: the cost model against pretrainings on one and two workers here, and the memory that a large set takes.

In each round one worker trains and two do (A B A B), and what gradients take through gloo on loopback is measured apart from
them. From this and the one worker's patches/s the model predicts the two workers'. Nothing is fitted to the outcome.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Result, RunFailed, run_contender, run_fresh
from patch_set import patch_set
from report import Record, Report, Table, medians
from worker import ROOT, Contender, own_memory

from sharding.manifest import read_dataset, read_manifest, shard_file
from sharding.process_pool import available_cores
from train.records.runs import Run

BACKBONE, IMAGE_SIZE, PART = "resnet18", 64, 32  # PART: patches of a worker in a step
PARAMETERS = 11_504_192  # of the backbone and its head
PATCHES, LOG_EVERY, FIRST = 1024, 2, 2  # FIRST: rows of metrics.jsonl that are left out, of the steps that warm up
ROWS = (1_000_000, 3_000_000)  # of manifests; what memory grows by between them is the patches'
RAY_CORES = 0.12  # of one core, that a dozen processes of Ray's take beside its workers (docs/pretraining.md)
LIMIT_S = 600.0  # for a run that hangs
_BUCKET = 25 * 2**20  # bytes that DistributedDataParallel reduces at a time
_SHARD_PATCHES = 8_000  # of the large sets: 128 MB of 16 kB each


def check(result: Result, work: Path, rounds: int) -> None:
    """Measure, and finish with rounds and memory in the record."""
    if available_cores() < 2:
        raise ValueError("--check needs two cores, one for each worker")
    work.mkdir(parents=True, exist_ok=True)
    result.record |= {"timed": {"rounds": rounds}, "memory": [], "rounds": []}
    data = patch_set(None, work, patches=PATCHES, size=IMAGE_SIZE, batch_size=2 * PART, cores=1)
    with tempfile.TemporaryDirectory(dir=work, prefix="runs-", ignore_cleanup_errors=True) as storage:

        def one_round() -> Record:
            one, two = (run_workers(workers, data.shards, Path(storage)) for workers in (1, 2))
            reduce_s = run_contender("scale_check", "reduce", Task(), limit=LIMIT_S)["seconds"]
            estimate = predicted(one, reduce_s)
            return {"one": one, "two": two, "reduce_s": reduce_s, "predicted": estimate, "error": estimate / two - 1}

        for number in range(1, rounds + 1):
            result.note(result.record["rounds"], f"round {number}", one_round, str)
    result.note(result.record["memory"], "memory", functools.partial(memory, data.shards, work), str)
    result.finish(report_of(result.record))


def run_workers(workers: int, shards: str, storage: Path) -> float:
    """Patches/s of a pretraining in the steady state, by its own metrics.jsonl. Raises RunFailed."""
    name = f"workers-{workers}-{time.monotonic_ns()}"
    flags = {"data": shards, "name": name, "storage": storage, "backbone": BACKBONE, "image-size": IMAGE_SIZE, "epochs": 1}
    flags |= {"batch-size": PART * workers, "workers": workers, "cpus-per-worker": 1, "gpus-per-worker": 0, "threads": 1}
    flags |= {"log-every": LOG_EVERY, "probe-every": 0}
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *(f"--{key}={value}" for key, value in flags.items())]
    local = {"RAY_ADDRESS": "local"}  # never on a cluster that this machine happens to belong to
    run_fresh(command, storage / f"{name}.log", limit=LIMIT_S, environment=local)
    return steady(Run(storage / name).metrics())


def steady(rows: list[Record]) -> float:
    """The median patches/s of the rows after the first ones. Raises RunFailed for too few rows."""
    if len(rows) < FIRST + 2:
        raise RunFailed(f"{len(rows)} rows of metrics are too few: the run was cut short")
    return statistics.median(row["patches_per_s"] for row in rows[FIRST:])


def predicted(one: float, reduce_s: float) -> float:
    """Patches/s of two workers, from those of one worker and the seconds that their gradients take.

    The step of scale.CostModel on a CPU, where nothing overlaps and batch norm is not shared; embeddings take 1 ms and are left
    out. Computing (with loading, loss and optimiser) takes what the one worker's step takes, PART / one seconds, over what Ray's
    processes leave of two cores: alone, a worker leaves them the other core.
    """
    return 2 * PART / (PART / one / (1 - RAY_CORES / 2) + reduce_s)


def memory(shards: str, work: Path) -> Record:
    """Bytes of memory for each patch: index_bytes in a rank, from opening the set to its first batches; manifest_bytes in the
    process that starts the run and selects the patches. From two sizes of sets, so that what any process takes cancels out.
    Raises RunFailed."""
    peaks: dict[str, list[int]] = {"rank": [], "driver": []}
    for rows in ROWS:
        large = work / f"rows-{rows}"
        write_large_set(Path(shards), large, rows)
        for name, found in peaks.items():
            found.append(run_contender("scale_check", name, Task(str(large)), limit=LIMIT_S)["peak_bytes"])
    rank, driver = ((found[1] - found[0]) / (ROWS[1] - ROWS[0]) for found in peaks.values())
    return {"index_bytes": rank, "manifest_bytes": driver}


def write_large_set(small: Path, large: Path, rows: int) -> None:
    """The patches of a small set's first shard again and again, with their own ids and keys, in shards that are all links to that
    one: the disk needs room for the manifest alone. Nothing is written where such a set is there."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if (large / "dataset.json").exists():
        return
    large.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(small)
    manifest = manifest.filter(pc.equal(manifest["shard"], 0))
    shards = -(-rows // _SHARD_PATCHES)
    for number in range(shards):
        (large / shard_file(number)).unlink(missing_ok=True)
        (large / shard_file(number)).symlink_to((small / shard_file(0)).absolute())
    with pq.ParquetWriter(large / "manifest.parquet", manifest.schema) as writer:
        for ids in np.array_split(np.arange(rows), -(-rows // 1_000_000)):
            shard = (ids // _SHARD_PATCHES).astype(np.int32)
            keys = [f"{number:06d}_{i:09d}" for number, i in zip(shard.tolist(), ids.tolist(), strict=True)]
            table = manifest.take(pa.array(ids % len(manifest)))
            for name, values in {"id": pa.array(ids), "key": pa.array(keys), "shard": pa.array(shard)}.items():
                table = table.set_column(table.schema.get_field_index(name), manifest.schema.field(name), values)
            writer.write_table(table)
    with (large / "manifest.parquet").open("rb") as file:
        files = {"manifest.parquet": hashlib.file_digest(file, "sha256").hexdigest()}
    described = read_dataset(small) | {"name": "large", "patches": rows, "shards": shards, "files": files}
    (large / "dataset.json").write_text(json.dumps(described))


# ---- In processes of their own ----


@dataclasses.dataclass(frozen=True)
class Task:
    shards: str = ""


def reduce_gradients(task: Task) -> dict[str, Any]:
    """Seconds that two processes of one thread each, joined by gloo, need to reduce the model's gradients: the median."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_reduce_rank, (folder,), nprocs=2)
        return {"seconds": statistics.median(json.loads((Path(folder) / "seconds.json").read_text()))}


def _reduce_rank(rank: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seconds = []
    for _ in range(6):
        buckets = torch.ones(PARAMETERS).split(_BUCKET // 4)
        dist.barrier()
        started = time.perf_counter()
        for bucket in buckets:
            dist.all_reduce(bucket)
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds[2:]))
    dist.destroy_process_group()


def rank(task: Task) -> dict[str, Any]:
    """The peak memory of a process that opens a set and reads its first batches."""
    import torch
    from contenders.loader import our_loader

    torch.set_num_threads(1)
    with our_loader(task.shards, batch_size=256, image_size=32) as loader:
        for _ in itertools.islice(loader, 4):
            pass
    return {"peak_bytes": own_memory("VmHWM")}


def driver(task: Task) -> dict[str, Any]:
    """The peak memory of a process that selects all patches of a set, as the driver of a pretraining does."""
    from pipelines.shard_reader import ShardReader
    from sharding.selection import select

    select(ShardReader(task.shards).manifest, split="train", fraction=1.0, seed=1)
    return {"peak_bytes": own_memory("VmHWM")}


CONTENDERS = {
    "reduce": Contender("gradients of two workers", reduce_gradients),
    "rank": Contender("a rank", rank),
    "driver": Contender("the driver", driver),
}


# ---- The report ----


def report_of(record: Record) -> Report:
    text = (
        f"{BACKBONE} at {IMAGE_SIZE} px, {PART} patches of each worker in a step, one core and one thread each, on Ray. Patches/s"
        f" of all workers: the median of the rows of metrics.jsonl after the first {FIRST}; one and two workers in turn."
        " Predicted: from the one worker's of the same round and from what gradients take through gloo on loopback; nothing is"
        " fitted. Error: predicted / measured - 1. Median: of each column."
    )
    lines = [f"- FAILED: {name}: {why}" for name, why in record["failed"].items()]
    lines += [
        f"- measured: memory for each patch: {taken['index_bytes']:.0f} bytes in a rank, {taken['manifest_bytes']:.0f} in the"
        " process that starts the run"
        for taken in record["memory"]
    ]
    rounds = {f"round {number}": each for number, each in enumerate(record["rounds"], 1)}
    if rounds:
        rounds["median"] = medians(record["rounds"], *record["rounds"][0])
    rows = [
        [title, *(f"{each[name]:.2f}" for name in ("one", "two", "predicted")), f"{each['error']:+.1%}"]
        for title, each in rounds.items()
    ]
    table = Table(["", "1 worker, patches/s", "2 workers, patches/s", "predicted", "error"], rows)
    return Report(record, "The cost model against one and two workers", [text, table, *lines])
