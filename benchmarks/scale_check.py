"""The cost model against real pretrainings on one and on two workers of this machine, and the memory that a large set takes.

In each round one worker trains and two do (A B A B). What the model needs to predict two workers is measured apart from them:
what gradients and embeddings take through gloo on loopback, and by how much two models that compute at once slow each other
down. From these and the one worker's patches/s the model predicts the two workers'. Nothing is fitted to the outcome.
"""

import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from contenders.scale import BACKBONE, DIM, IMAGE_SIZE, LIMIT_S, PART, Task
from harness import Result, RunFailed, run_contender, run_fresh
from patch_set import patch_set
from report import Record, Report, Table
from scale_model import Machine, Workload, step_parts
from worker import ROOT

from sharding.process_pool import available_cores
from train.records.runs import Run

PATCHES, LOG_EVERY, FIRST = 1024, 2, 2  # FIRST: rows of metrics.jsonl that are left out, of the steps that warm up
ROWS = (1_000_000, 3_000_000)  # of manifests; what memory grows by between them is the patches'
RAY_CORES = 0.12  # of one core, that a dozen processes of Ray's take beside its workers (docs/pretraining.md)


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
            jobs["exchange"] = functools.partial(run_contender, "contenders.scale", "exchange", Task(), limit=LIMIT_S)
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
    return {"patches_per_s": median, "spread": (max(rates) - min(rates)) / median, "rows": len(rates), "data_wait": waits}


def predicted(one: float, exchange: Record) -> float:
    """Patches/s of two workers, from those of one worker and what was measured beside it.

    The model's step of two workers, whose computing (with loading, loss and optimiser) takes PART / one seconds, times what two
    that compute at once slow each other down by, and over what Ray's processes leave of two cores: alone, a worker leaves them
    the other core.
    """
    computing = PART / one * exchange["slowdown"] / (1 - RAY_CORES / 2)
    nothing = {name: 0.0 for name in Workload.__dataclass_fields__ if name not in ("views", "sources")}
    given = {"parameters": exchange["parameters"], "flops_per_view": 1.0, "projection_dim": DIM, "batch_per_gpu": PART}
    work = Workload(**(nothing | given | {"largest_batch": None}))
    nothing = {name: 0.0 for name in Machine.__dataclass_fields__ if name not in ("name", "sync_norms", "sources")}
    given = {
        "gpus": 2,
        "cores": 2,
        "model_flops_per_s": 2 * PART / computing,
        "loss_flops_per_s": float("inf"),  # 6 million operations: a tenth of a millisecond
        # An all-reduce is two collectives, and in each half of the bytes cross.
        "link_bytes_per_s": 4 * exchange["parameters"] / (exchange["reduce_s"] - 2 * exchange["hop_s"]),
        "link_latency_s": exchange["hop_s"],
    }
    node = Machine(name="this one", sync_norms=False, **(nothing | given | {"device_patches_per_s": None}))
    return 2 * PART / step_parts(work, node, 2).total


def summarise(record: Record) -> Record:
    """For each complete round: the two workers' patches/s measured and predicted, and error = predicted / measured - 1; and their
    medians, and the lowest and the highest error."""
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
        job = functools.partial(
            run_contender, "contenders.scale", task=Task(shards, str(work / f"rows-{rows}"), rows), limit=LIMIT_S
        )
        job("write")
        ranks.append(job("rank"))
        drivers.append(job("driver")["peak_bytes"])
    patches = ROWS[1] - ROWS[0]
    peaks = [1e6 * (each["baseline_mb"] + each["peak_mb_over_baseline"]) for each in ranks]
    per_patch = {"index_bytes": (peaks[1] - peaks[0]) / patches, "manifest_bytes": (drivers[1] - drivers[0]) / patches}
    return {"rows": ROWS, **per_patch, "ranks": ranks, "driver_peak_bytes": drivers}


# ---- The report ----


def report_of(record: Record) -> Report:
    timed, found = record["timed"], record["summary"]
    text = (
        f"{timed['backbone']} at {timed['image_size']} px, {timed['patches_per_worker']} patches of each worker in a step, one"
        f" core and one thread each, on Ray. Patches/s of all workers: the median of the rows of metrics.jsonl after the first"
        f" {timed['left_out']}; one and two workers in turn. Predicted: from the one worker's of the same round and from what was"
        " measured beside it (below); nothing is fitted. Error: predicted / measured - 1."
    )
    runs = [pair[workers] for pair in record["rounds"] for workers in ("1", "2") if pair[workers]]
    if runs:
        spreads, loads = [run["spread"] for run in runs], [run["load_before"] for run in runs]
        text += (
            f" Within a run rows spread by {min(spreads):.0%} to {max(spreads):.0%} of the median; load before the runs"
            f" {min(loads):.1f} to {max(loads):.1f} on {record['machine']['cores']} cores."
        )
    rounds = {f"round {number}": each for number, each in enumerate(found["rounds"], 1)}
    rounds |= {"median": found} if rounds else {}
    rows = [
        [title, *(f"{each[name]:.2f}" for name in ("one", "two", "predicted")), f"{each['error']:+.1%}"]
        for title, each in rounds.items()
    ]
    table = Table(["", "1 worker, patches/s", "2 workers, patches/s", "predicted", "error"], rows)
    return Report(record, "The cost model against one and two workers", [text, table, *lines(record)])


def lines(record: Record) -> list[str]:
    found, taken = record["summary"], record["memory"]
    exchanges = [pair["exchange"] for pair in record["rounds"] if pair["exchange"]]
    said = [f"- FAILED: {name}: {why}" for name, why in record["failed"].items()]
    if found["rounds"]:
        rounds = len(found["rounds"])
        spread = f" in the median, from {found['lowest']:+.1%} to {found['highest']:+.1%} over {rounds} rounds"
        said.append(
            f"- measured: the model's error for two workers: {found['error']:+.1%}{spread if rounds > 1 else ', in one round'};"
            f" doubling without any loss would be off by {2 * found['one'] / found['two'] - 1:+.1%}"
        )
    if exchanges:
        middle = {key: statistics.median(each[key] for each in exchanges) for key in exchanges[0]}
        said.append(
            f"- measured: {4 * middle['parameters'] / 1e6:.0f} MB of gradients take {1e3 * middle['reduce_s']:.1f} ms through"
            f" gloo on loopback, embeddings {1e3 * middle['gather_s']:.2f} ms, a word {1e3 * middle['hop_s']:.2f} ms; two models"
            f" at once take {middle['slowdown']:.3f} of the time of one (medians over the rounds)"
        )
    if taken:
        said.append(
            f"- measured: memory for each patch: {taken['index_bytes']:.0f} bytes in a rank, {taken['manifest_bytes']:.0f} in the"
            " process that starts the run"
        )
    return said
