"""The cost model against real pretrainings on one and on two workers of this machine, and the memory that a large set takes.

In each round one worker trains and two do (A B A B), and apart from them is measured what the model needs to say something of
two: what gradients and embeddings take through gloo on loopback, and by how much two models that compute at the same time slow
each other down. From these and the one worker's patches/s the model predicts the two workers'. Nothing is fitted to the outcome.
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

import large_manifest  # noqa: E402
from measuring import RunFailed, heading, markdown_table, run_fresh  # noqa: E402
from patch_set import patch_set  # noqa: E402
from scale_model import Machine, Workload, step_parts  # noqa: E402

from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import Run  # noqa: E402

Record = dict[str, Any]

BACKBONE, IMAGE_SIZE, PART, DIM = "resnet18", 64, 32, 128  # PART: patches of a worker in a step
PATCHES, LOG_EVERY, FIRST = 1024, 2, 2  # FIRST: rows of metrics.jsonl that are left out, of the steps that warm up
ROWS = (1_000_000, 3_000_000)  # of manifests; what memory grows by between them is the patches'
RAY_CORES = 0.12  # of one core, that a dozen processes of Ray's take beside its workers (docs/pretraining.md)
_TIMED = 4  # exchanges, and steps, of which the median counts
_BUCKET = 25 * 2**20  # bytes that DistributedDataParallel reduces at a time
_LIMIT_S = 600.0  # for a run that hangs


def check(record: Record, work: Path, rounds: int, note: Callable[[Record], None]) -> Record:
    """The record with constants, rounds, memory and summary. note: is given the record after every run."""
    if available_cores() < 2:
        raise ValueError("--check needs two cores, one for each worker")
    work.mkdir(parents=True, exist_ok=True)
    record |= {
        "timed": {
            "backbone": BACKBONE,
            "image_size": IMAGE_SIZE,
            "patches_per_worker": PART,
            "rounds": rounds,
            "left_out": FIRST,
        },
        "memory": None,
        "rounds": [],
    }
    data = patch_set(None, work, patches=PATCHES, size=IMAGE_SIZE, batch_size=2 * PART, cores=1)

    def part(name: str, measure: Callable[[], Any]) -> Any:
        try:
            found = measure()
        except RunFailed as error:  # the others' figures are worth having; the exit code tells
            record["failed"][name] = str(error)
            return None
        finally:
            note(record)
        return found

    with tempfile.TemporaryDirectory(dir=work, prefix="runs-", ignore_cleanup_errors=True) as storage:
        for number in range(1, rounds + 1):
            pair: Record = {}
            for workers in (1, 2):
                run = functools.partial(run_workers, workers, data.shards, Path(storage))
                pair[str(workers)] = part(f"round {number}, {workers} workers", run)
            pair["exchange"] = part(f"round {number}, exchange", lambda: _job("exchange", {}, work))
            record["rounds"].append(pair)
            note(record)
    record["memory"] = part("memory", lambda: memory(data.shards, work))
    record["summary"] = summarise(record)
    return record


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
    said = [f"--{key}={value}" for key, value in flags.items()]
    # Never on a cluster that this machine happens to belong to.
    command = ["env", "RAY_ADDRESS=local", sys.executable, str(ROOT / "train" / "pretrain.py"), *said]
    load = os.getloadavg()[0]
    run_fresh(command, storage / f"{name}.log", _limit())
    return steady(Run(storage / name).metrics()) | {"load_before": round(load, 2)}


def steady(rows: list[Record]) -> Record:
    """patches_per_s: the median of the rows after the first ones; spread: from the slowest of them to the fastest, as a share of
    it. Raises RunFailed for too few rows."""
    rates = [row["patches_per_s"] for row in rows[FIRST:]]
    if len(rates) < 2:
        raise RunFailed(f"{len(rows)} rows of metrics are too few: the run was cut short")
    median = statistics.median(rates)
    waits = statistics.median(row["data_wait"] for row in rows[FIRST:])
    return {"patches_per_s": median, "spread": (max(rates) - min(rates)) / median, "rows": len(rates), "data_wait": waits}


def predicted(one: float, exchange: Record) -> float:
    """Patches/s of two workers, from those of one worker and what was measured beside it.

    The model's step of two workers, whose computing (with loading, loss and optimiser) takes PART / one seconds, times what two
    that compute at once slow each other down by, and over what Ray's processes leave of two cores: alone, a worker leaves them
    the other core.
    """
    computing = PART / one * exchange["slowdown"] / (1 - RAY_CORES / 2)
    work = Workload(
        backbone=BACKBONE,
        parameters=exchange["parameters"],
        norms=0,
        flops_per_view=1.0,
        bytes_per_patch=0.0,
        projection_dim=DIM,
        batch_per_gpu=PART,
        largest_batch=None,
        shard_bytes=1.0,
        index_bytes=0.0,
        manifest_bytes=0.0,
    )
    node = Machine(
        name="this one",
        gpus=2,
        cores=2,
        memory_bytes=0.0,
        disk_bytes=0.0,
        disk_bytes_per_s=0.0,
        model_flops_per_s=2 * PART / computing,
        loss_flops_per_s=float("inf"),  # 6 million operations: a tenth of a millisecond
        launch_s=0.0,
        device_patches_per_s=None,
        host_core_s=0.0,
        decode_core_s=0.0,
        # An all-reduce is two collectives, and in each half of the bytes cross.
        link_bytes_per_s=4 * exchange["parameters"] / (exchange["reduce_s"] - 2 * exchange["hop_s"]),
        network_bytes_per_s=0.0,
        link_latency_s=exchange["hop_s"],
        network_latency_s=0.0,
        store_bytes_per_s=0.0,
        store_requests_per_s=0.0,
        stream_bytes_per_s=0.0,
        overlap=0.0,
        sync_norms=False,
    )
    return 2 * PART / step_parts(work, node, 2).total


def summarise(record: Record) -> Record:
    """For each round that is whole: the two workers' patches/s measured and predicted, and error = predicted / measured - 1; and
    their medians, and from the lowest to the highest error."""
    rounds = []
    for pair in record["rounds"]:
        if all(pair.values()):
            one, two = pair["1"]["patches_per_s"], pair["2"]["patches_per_s"]
            said = predicted(one, pair["exchange"])
            rounds.append({"one": one, "two": two, "predicted": said, "error": said / two - 1})
    if not rounds:
        return {"rounds": []}
    middle = {key: statistics.median(each[key] for each in rounds) for key in ("one", "two", "predicted", "error")}
    errors = [each["error"] for each in rounds]
    return {"rounds": rounds, **middle, "lowest": min(errors), "highest": max(errors)}


def memory(shards: str, work: Path) -> Record:
    """Bytes of memory for each patch: index_bytes in a rank, at most, from opening the set to its first batches; manifest_bytes
    in the process that starts the run and selects the patches. From two sizes of sets, so that what any process takes cancels
    out. Raises RunFailed."""
    ranks, drivers = [], []
    for rows in ROWS:
        large = str(work / f"rows-{rows}")
        # Not here: the most memory of a process begins with that of the one which started it.
        _job("write", {"shards": shards, "work": large, "rows": rows}, work)
        log = work / "memory.log"
        command = [sys.executable, str(large_manifest.__file__), "--measure", "--data", shards, "--work", large]
        run_fresh([*command, f"--rows={rows}"], log, _limit())
        ranks.append(json.loads(log.read_text().strip().splitlines()[-1]))
        drivers.append(_job("driver", {"shards": large}, work)["peak_bytes"])
    patches = ROWS[1] - ROWS[0]
    peaks = [1e6 * (each["baseline_mb"] + each["peak_mb_over_baseline"]) for each in ranks]
    return {
        "rows": ROWS,
        "index_bytes": (peaks[1] - peaks[0]) / patches,
        "manifest_bytes": (drivers[1] - drivers[0]) / patches,
        "ranks": ranks,
        "driver_peak_bytes": drivers,
    }


# ---- In processes of their own ----


def _limit() -> Callable[[int], None]:
    until = time.monotonic() + _LIMIT_S

    def watch(_: int) -> None:
        if time.monotonic() > until:
            raise RunFailed(f"not done after {_LIMIT_S:g} s")

    return watch


def _job(name: str, given: Record, work: Path) -> Record:
    with tempfile.TemporaryDirectory(dir=work, prefix="job-") as folder:
        result = Path(folder) / "result.json"
        run_fresh([sys.executable, __file__, name, json.dumps(given), str(result)], work / f"{name}.log", _limit())
        return json.loads(result.read_text())


def exchange() -> Record:
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
    limit = datetime.timedelta(seconds=_LIMIT_S)
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

    found: Record = {"parameters": parameters}
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


def write(shards: str, work: str, rows: int) -> Record:
    """A set of so many patches, unless it is there."""
    large_manifest.write_large_set(large_manifest.Config(data=shards, work=work, rows=rows))
    return {}


def driver(shards: str) -> Record:
    """The most memory of a process that selects all patches of a set, as the driver of a pretraining does."""
    from pipelines.shard_reader import ShardReader
    from sharding.selection import select

    select(ShardReader(shards).manifest, split="train", fraction=1.0, seed=1)
    # Not getrusage's, which begins with that of the process that started this one.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return {"peak_bytes": int(peak.split()[1]) * 1024}


# ---- What is said of it ----


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    rows = [
        [f"round {number}", f"{each['one']:.2f}", f"{each['two']:.2f}", f"{each['predicted']:.2f}", f"{each['error']:+.1%}"]
        for number, each in enumerate(record["summary"]["rounds"], 1)
    ]
    if rows:
        found = record["summary"]
        rows.append(
            ["median", f"{found['one']:.2f}", f"{found['two']:.2f}", f"{found['predicted']:.2f}", f"{found['error']:+.1%}"]
        )
    return ["", "1 worker, patches/s", "2 workers, patches/s", "predicted", "error"], rows


def lines(record: Record) -> list[str]:
    found, taken = record["summary"], record["memory"]
    exchanges = [pair["exchange"] for pair in record["rounds"] if pair["exchange"]]
    said = [f"FAILED: {name}: {why}" for name, why in record["failed"].items()]
    if found["rounds"]:
        rounds = len(found["rounds"])
        spread = f" in the median, from {found['lowest']:+.1%} to {found['highest']:+.1%} over {rounds} rounds"
        said.append(
            f"measured: the model's error for two workers: {found['error']:+.1%}{spread if rounds > 1 else ', in one round'};"
            f" doubling without any loss would be off by {2 * found['one'] / found['two'] - 1:+.1%}"
        )
    if exchanges:
        middle = {key: statistics.median(each[key] for each in exchanges) for key in exchanges[0]}
        said.append(
            f"measured: {4 * middle['parameters'] / 1e6:.0f} MB of gradients take {1e3 * middle['reduce_s']:.1f} ms through gloo"
            f" on loopback, embeddings {1e3 * middle['gather_s']:.2f} ms, a word {1e3 * middle['hop_s']:.2f} ms; two models at"
            f" once take {middle['slowdown']:.3f} of the time of one (medians over the rounds)"
        )
    if taken:
        said.append(
            f"measured: memory for each patch: {taken['index_bytes']:.0f} bytes in a rank, {taken['manifest_bytes']:.0f} in the"
            " process that starts the run"
        )
    return said


def markdown(record: Record) -> str:
    timed = record["timed"]
    text = (
        f"{timed['backbone']} at {timed['image_size']} px, {timed['patches_per_worker']} patches of each worker in a step, one"
        f" core and one thread each, on Ray. Patches/s of all workers: the median of the rows of metrics.jsonl after the first"
        f" {timed['left_out']}; one and two workers in turn. Predicted: from the one worker's of the same round and from what was"
        " measured beside it (below); nothing is fitted. Error: predicted / measured - 1."
    )
    runs = [pair[workers] for pair in record["rounds"] for workers in ("1", "2") if pair[workers]]
    within = ""
    if runs:
        spreads, loads = [run["spread"] for run in runs], [run["load_before"] for run in runs]
        within = (
            f" Within a run rows spread by {min(spreads):.0%} to {max(spreads):.0%} of the median; load before the runs"
            f" {min(loads):.1f} to {max(loads):.1f} on {record['machine']['cores']} cores."
        )
    said = [f"- {line}" for line in lines(record)]
    return "\n".join(
        [
            *heading("The cost model against one and two workers", record),
            text + within,
            "",
            *markdown_table(*table(record)),
            "",
            *said,
            "",
        ]
    )


if __name__ == "__main__":
    _, job, arguments, result = sys.argv
    jobs: dict[str, Callable[..., Record]] = {"exchange": exchange, "write": write, "driver": driver}
    Path(result).write_text(json.dumps(jobs[job](**json.loads(arguments))))
