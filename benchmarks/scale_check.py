"""scale.py --check: the cost model against pretrainings on one and two workers here, and the memory that a large set takes.

In each round one worker trains and two do (A B A B). What the model needs to predict two workers is measured apart from them:
what gradients and embeddings take through gloo on loopback, and by how much two models that compute at once slow each other
down. From these and the one worker's patches/s the model predicts the two workers'. Nothing is fitted to the outcome.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Result, RunFailed, run_contender, run_fresh
from patch_set import patch_set
from report import Record, Report, Table, medians, spread
from scale import machine, step_parts, workload
from worker import ROOT, Contender, own_memory

from sharding.manifest import read_dataset, read_manifest, shard_file
from sharding.process_pool import available_cores
from train.records.runs import Run

BACKBONE, IMAGE_SIZE, PART, DIM = "resnet18", 64, 32, 128  # PART: patches of a worker in a step
PATCHES, LOG_EVERY, FIRST = 1024, 2, 2  # FIRST: rows of metrics.jsonl that are left out, of the steps that warm up
ROWS = (1_000_000, 3_000_000)  # of manifests; what memory grows by between them is the patches'
RAY_CORES = 0.12  # of one core, that a dozen processes of Ray's take beside its workers (docs/pretraining.md)
LIMIT_S = 600.0  # for a run that hangs
_TIMED = 4  # exchanges, and steps, of which the median counts
_BUCKET = 25 * 2**20  # bytes that DistributedDataParallel reduces at a time
_SHARD_PATCHES = 8_000  # of the large sets: 128 MB of 16 kB each


def check(result: Result, work: Path, rounds: int) -> None:
    """Measure, and finish with constants, rounds, memory and summary in the record."""
    if available_cores() < 2:
        raise ValueError("--check needs two cores, one for each worker")
    work.mkdir(parents=True, exist_ok=True)
    timed = {"backbone": BACKBONE, "image_size": IMAGE_SIZE, "patches_per_worker": PART, "rounds": rounds, "left_out": FIRST}
    result.record |= {"timed": timed, "memory": None, "rounds": []}
    data = patch_set(None, work, patches=PATCHES, size=IMAGE_SIZE, batch_size=2 * PART, cores=1)
    with tempfile.TemporaryDirectory(dir=work, prefix="runs-", ignore_cleanup_errors=True) as storage:
        for number in range(1, rounds + 1):
            jobs = {str(n): functools.partial(run_workers, n, data.shards, Path(storage)) for n in (1, 2)}
            jobs["exchange"] = functools.partial(run_contender, "scale_check", "exchange", Task(), limit=LIMIT_S)
            pair = {}
            for key, job in jobs.items():
                title = f"round {number}, {key}{'' if key == 'exchange' else ' workers'}"
                pair[key] = result.attempt(title, title, job, _shown)
            result.record["rounds"].append(pair)
            result.save()
    result.record["memory"] = result.attempt("memory", "memory", lambda: memory(data.shards, work), lambda found: str(found))
    result.finish(report_of(result.record | {"summary": summarise(result.record)}))


def _shown(found: Record) -> str:
    return f"{found['patches_per_s']:.1f} patches/s" if "patches_per_s" in found else f"slowdown {found['slowdown']:.3f}"


def run_workers(workers: int, shards: str, storage: Path) -> Record:
    """Patches/s of a pretraining in the steady state, by its own metrics.jsonl. Raises RunFailed."""
    name = f"workers-{workers}-{time.monotonic_ns()}"
    flags = {
        "data": shards,
        "name": name,
        "storage": storage,
        "backbone": BACKBONE,
        "image-size": IMAGE_SIZE,
        "batch-size": PART * workers,
        "epochs": 1,
        "workers": workers,
        "cpus-per-worker": 1,
        "gpus-per-worker": 0,
        "threads": 1,
        "log-every": LOG_EVERY,
        "probe-every": 0,
    }
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *(f"--{key}={value}" for key, value in flags.items())]
    load, local = os.getloadavg()[0], {"RAY_ADDRESS": "local"}  # never on a cluster that this machine happens to belong to
    run_fresh(command, storage / f"{name}.log", limit=LIMIT_S, environment=local)
    return steady(Run(storage / name).metrics()) | {"load_before": round(load, 2)}


def steady(rows: list[Record]) -> Record:
    """patches_per_s: the median of the rows after the first ones; spread: from the slowest of them to the fastest, as a share of
    it. Raises RunFailed for too few rows."""
    rates = [row["patches_per_s"] for row in rows[FIRST:]]
    if len(rates) < 2:
        raise RunFailed(f"{len(rows)} rows of metrics are too few: the run was cut short")
    median = statistics.median(rates)
    waits = statistics.median(row["data_wait"] for row in rows[FIRST:])
    return {"patches_per_s": median, "spread": spread(rates), "rows": len(rates), "data_wait": waits}


def predicted(one: float, exchange: Record) -> float:
    """Patches/s of two workers, from those of one worker and what was measured beside it.

    The model's step of two workers, whose computing (with loading, loss and optimiser) takes PART / one seconds, times what two
    that compute at once slow each other down by, and over what Ray's processes leave of two cores: alone, a worker leaves them
    the other core.
    """
    computing = PART / one * exchange["slowdown"] / (1 - RAY_CORES / 2)
    work = dataclasses.replace(workload(PART, None)[0], parameters=exchange["parameters"], flops_per_view=1.0, projection_dim=DIM)
    node = dataclasses.replace(
        machine("cpu")[0],
        gpus=2,
        host_core_s=0.0,  # loading is part of the computing
        model_flops_per_s=2 * PART / computing,
        loss_flops_per_s=math.inf,  # 6 million operations: a tenth of a millisecond
        # An all-reduce is two collectives, and in each half of the bytes cross.
        link_bytes_per_s=4 * exchange["parameters"] / (exchange["reduce_s"] - 2 * exchange["hop_s"]),
        link_latency_s=exchange["hop_s"],
    )
    return 2 * PART / sum(step_parts(work, node, 2).values())


def summarise(record: Record) -> Record:
    """For each complete round: the two workers' patches/s measured and predicted, and error = predicted / measured - 1; and their
    medians, and the lowest and the highest error."""
    rounds: list[Record] = []
    for pair in record["rounds"]:
        if all(pair.values()):
            one, two = pair["1"]["patches_per_s"], pair["2"]["patches_per_s"]
            estimate = predicted(one, pair["exchange"])
            rounds.append({"one": one, "two": two, "predicted": estimate, "error": estimate / two - 1})
    if not rounds:
        return {"rounds": []}
    errors = [each["error"] for each in rounds]
    return {"rounds": rounds, **medians(rounds, *rounds[0]), "lowest": min(errors), "highest": max(errors)}


def memory(shards: str, work: Path) -> Record:
    """Bytes of memory for each patch: index_bytes in a rank, at most, from opening the set to its first batches; manifest_bytes
    in the process that starts the run and selects the patches. From two sizes of sets, so that what any process takes cancels
    out. Raises RunFailed."""
    peaks: dict[str, list[int]] = {"rank": [], "driver": []}
    for rows in ROWS:
        large = work / f"rows-{rows}"
        write_large_set(Path(shards), large, rows)
        for name, found in peaks.items():
            found.append(run_contender("scale_check", name, Task(str(large)), limit=LIMIT_S)["peak_bytes"])
    grown = {name: (found[1] - found[0]) / (ROWS[1] - ROWS[0]) for name, found in peaks.items()}
    return {"rows": ROWS, "index_bytes": grown["rank"], "manifest_bytes": grown["driver"], "peak_bytes": peaks}


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
    (large / "dataset.json").write_text(
        json.dumps(read_dataset(small) | {"name": "large", "patches": rows, "shards": shards, "files": {}})
    )


# ---- In processes of their own ----


@dataclasses.dataclass(frozen=True)
class Task:
    shards: str = ""


def exchange(task: Task) -> dict[str, Any]:
    """Of two processes of one thread each, joined by gloo: reduce_s, of the model's gradients; gather_s, of the embeddings and
    their gradients; hop_s, of a single number; alone_s and together_s, a step without exchange of one model, and of each of two
    at a time; slowdown, together_s / alone_s."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_exchange_rank, (folder,), nprocs=2)
        return json.loads((Path(folder) / "found.json").read_text())


def _exchange_rank(rank: int, folder: str) -> None:
    import torch
    import torch.distributed as dist
    from contenders.step import Task as Step
    from contenders.step import model_step

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    timed: dict[str, Any] = {"device": "cpu", "bf16": False, "cores": 1, "seconds": 0.0, "steps": 0}
    training = model_step(Step("", "", "", BACKBONE, IMAGE_SIZE, PART, **timed))
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
    "exchange": Contender("two workers' exchange", exchange),
    "rank": Contender("a rank", rank),
    "driver": Contender("the driver", driver),
}


# ---- The report ----


def report_of(record: Record) -> Report:
    timed, found = record["timed"], record["summary"]
    runs = [pair[workers] for pair in record["rounds"] for workers in ("1", "2") if pair[workers]]
    ranges = [[run[name] for run in runs] or [math.nan] for name in ("spread", "load_before")]
    (spread_low, spread_high), (load_low, load_high) = ((min(values), max(values)) for values in ranges)
    text = (
        f"{timed['backbone']} at {timed['image_size']} px, {timed['patches_per_worker']} patches of each worker in a step, one"
        f" core and one thread each, on Ray. Patches/s of all workers: the median of the rows of metrics.jsonl after the first"
        f" {timed['left_out']}; one and two workers in turn. Predicted: from the one worker's of the same round and from what was"
        " measured beside it (below); nothing is fitted. Error: predicted / measured - 1. Within a run rows spread by"
        f" {spread_low:.0%} to {spread_high:.0%} of the median; load before the runs {load_low:.1f} to {load_high:.1f} on"
        f" {record['machine']['cores']} cores."
    )
    rounds = {f"round {number}": each for number, each in enumerate(found["rounds"], 1)}
    rounds |= {"median": found} if rounds else {}
    rows = [
        [title, *(f"{each[name]:.2f}" for name in ("one", "two", "predicted")), f"{each['error']:+.1%}"]
        for title, each in rounds.items()
    ]
    table = Table(["", "1 worker, patches/s", "2 workers, patches/s", "predicted", "error"], rows)
    lines = [f"- FAILED: {name}: {why}" for name, why in record["failed"].items()]
    if rounds:
        lines.append(
            f"- measured: the model's error for two workers: {found['error']:+.1%} in the median, from {found['lowest']:+.1%} to"
            f" {found['highest']:+.1%}; doubling without any loss would be off by {2 * found['one'] / found['two'] - 1:+.1%}"
        )
    if exchanges := [pair["exchange"] for pair in record["rounds"] if pair["exchange"]]:
        middle = medians(exchanges, "parameters", "reduce_s", "gather_s", "hop_s", "slowdown")
        lines.append(
            f"- measured: {4 * middle['parameters'] / 1e6:.0f} MB of gradients take {1e3 * middle['reduce_s']:.1f} ms through"
            f" gloo on loopback, embeddings {1e3 * middle['gather_s']:.2f} ms, a word {1e3 * middle['hop_s']:.2f} ms; two models"
            f" at once take {middle['slowdown']:.3f} of the time of one (medians over the rounds)"
        )
    if taken := record["memory"]:
        lines.append(
            f"- measured: memory for each patch: {taken['index_bytes']:.0f} bytes in a rank, {taken['manifest_bytes']:.0f} in the"
            " process that starts the run"
        )
    return Report(record, "The cost model against one and two workers", [text, table, *lines])
