"""A job on Ray Train workers, or in this process; and functions called on workers."""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from train.cluster.diagnostics import preflight
from train.cluster.ray_cluster import Nodes, alive_nodes, connect, possible_nodes
from train.cluster.resources import Share, share_of
from train.config import worker_range
from train.records.checkpoint_store import LOCK_TIMEOUT_S, CheckpointStore
from train.records.provenance import RECORD_NAME
from train.records.remote_run import Mirror, fetch_source
from train.records.retry import await_folder
from train.records.run_lock import StoreLock
from train.records.runs import versions
from train.trainer.loop import Job, fit
from train.trainer.prometheus import meaning, readings, shown_name
from train.trainer.worker import Worker, single_worker

Common = TypeVar("Common")
Item = TypeVar("Item")
Result = TypeVar("Result")

_BOOKS = "ray"  # under the run's folder, where Ray keeps its own
_PAUSE = 15.0  # seconds that another failure without a new checkpoint makes the next attempt wait for longer, up to
_LONGEST_PAUSE = 60.0
_CUT_OFF_S = 15.0  # without the head, after which a worker ends
_LOOK_S = 2.0  # between two looks for it
_LOCK_TIMEOUT_AGAIN_S = 120.0  # a worker of the attempt before may go on for so long where it is cut off (docs/cluster.md)


def run_job(job: Job, workers: str | int, gpus_per_worker: float | None = None, cpus_per_worker: int = 0) -> str:
    """Train the job to its end, going on from its newest checkpoint. Returns the device, in words.

    workers: of Ray Train, a number or LEAST:MOST; 0: this process, without Ray. A run may go on with others than it began with.
    gpus_per_worker: None is one where there are GPUs; 0 is none; a part of one leaves the rest to other runs. cpus_per_worker:
    0 is an equal share of all.
    Raises ValueError when a worker did, with its sentence, and where the cluster has not so much.
    """
    if worker_range(workers)[1] == 0:
        worker = single_worker(job.folder, torch.device("cpu") if gpus_per_worker == 0 else None, url=job.url)
        with mirrored(job):
            fit(_with_local_init(job), worker, _gauges(job) if _in_a_process_of_ray() else None)
        return _device_name(worker.device)
    with mirrored(job):
        return _run_on_ray(job, workers, gpus_per_worker, cpus_per_worker)


@contextlib.contextmanager
def mirrored(job: Job) -> Iterator[None]:
    """A block in which the job is run, on whatever nodes. Before it, a run at a URL has there what this process left of it, and
    nobody else trains it; after it, this node has what the workers left."""
    if job.url is None:
        yield
        return
    mirror = Mirror(job.url)
    mirror.push(RECORD_NAME)
    StoreLock(mirror.store, mirror.folder).wait()
    yield
    mirror.pull(whole=True)


def map_on_workers(
    function: Callable[[Common, Item, str, int], Result],
    common: Common,
    items: Sequence[Item],
    *,
    sets: Sequence[tuple[str, str]],
    workers: str | int,
    gpus_per_worker: float | None = None,
    cpus_per_worker: int = 0,
    threads: int | None = None,
) -> Iterator[tuple[int, Result]]:
    """Call function(common, item, device, threads) for each item, each exactly once, on as many workers at a time.

    sets: folder or URL, and fingerprint, of each shard set that it reads. workers: as for a job; 0 is this process, without Ray.
    common goes to a node once. Yields each item's place and result, as
    they come. What a worker was at when it died is done again by another.
    Raises ValueError when the function did, with its sentence, and where the cluster has not so many.
    """
    least, most = worker_range(workers)
    if most == 0:
        device = "cuda" if gpus_per_worker != 0 and torch.cuda.is_available() else "cpu"
        for place, item in enumerate(items):
            yield place, function(common, item, device, threads or 0)
        return
    connect()
    import ray

    share = share_of(possible_nodes(), least, most, gpus_per_worker, cpus_per_worker, said=str(workers))
    _preflight("workers", share, sets)
    call = ray.remote(_called).options(name=function.__name__, num_cpus=share.cpus, num_gpus=share.gpus, max_retries=3)
    device = "cuda" if share.gpus else "cpu"
    shared, left = ray.put(common), iter(enumerate(items))
    running = {
        call.remote(function, shared, item, device, threads or share.cpus): place for place, item in itertools.islice(left, most)
    }
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            place = running.pop(done)
            for following, item in itertools.islice(left, 1):
                running[call.remote(function, shared, item, device, threads or share.cpus)] = following
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ValueError):
                    raise ValueError(str(error.cause)) from None
                raise
            yield place, result
    finally:
        for each in running:
            ray.cancel(each, force=True)


def _called(function, common, item, device, threads):
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    return function(common, item, device, threads)


def _run_on_ray(job, workers, gpus_per_worker, cpus_per_worker):
    connect(shown_name(job.folder))
    least, most = worker_range(workers)
    share = share_of(possible_nodes(), least, most, gpus_per_worker, cpus_per_worker, said=str(workers))
    sets = [(each.shards, each.fingerprint) for each in job.input.sets]
    _preflight(job.folder.name, share, sets, storage=job.url or str(job.folder))
    job.folder.mkdir(parents=True, exist_ok=True)
    _to_the_end(job, lambda again: _attempt(job, least, most, share, again=again))
    return f"{workers} x {'GPU' if share.gpus else 'CPU'}"


def _to_the_end(job: Job, attempt: Callable[[bool], BaseException | None]) -> None:
    """Attempt it until nothing fails. attempt: told whether there was one before, returns what it failed with.

    A failure counts for as long as no new checkpoint follows it. Raises the one that is one too many, and a ValueError at once:
    what the user has to put right would only come again.
    """
    failures, newest = 0, _newest_checkpoint(job)
    while (error := attempt(failures > 0)) is not None:
        before, newest = newest, _newest_checkpoint(job)
        failures = 1 if newest != before else failures + 1
        if isinstance(error, ValueError) or failures > job.max_failures:
            raise error
        print(
            f"{job.folder.name}: {_reason(error)}; going on from {newest or 'the beginning'} (failure {failures} of at most"
            f" {job.max_failures} without a new checkpoint)",
            flush=True,
        )
        time.sleep(min(_PAUSE * (failures - 1), _LONGEST_PAUSE))


def _attempt(job, least, most, share, *, again) -> BaseException | None:
    """Train on workers until the end, or until one of them fails. Returns what it failed with.

    Ray itself starts anew what a node's preemption ends, and waits for nodes that are missing, but counts all other failures of
    a run, however long ago. Those are left to the caller. again: workers of an attempt before may not know yet that it is over.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    await_folder(job.folder)
    shutil.rmtree(job.folder / _BOOKS, ignore_errors=True)  # what Ray noted of an earlier attempt, which it would go on from
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": dataclasses.replace(job, threads=job.threads or share.cpus), "again": again},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
            use_gpu=share.gpus > 0,
            resources_per_worker={"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {}),
        ),
        run_config=RunConfig(
            name=shown_name(job.folder),
            storage_path=str(job.folder / _BOOKS),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = _cause(error)
        cause.__cause__ = None if cause is error else error
        return cause
    return None


def _newest_checkpoint(job) -> str | None:
    return CheckpointStore(job.folder, url=job.url).newest()


def _reason(error) -> str:
    """Why an attempt failed, in a few words. Of workers of which one dies, the others fail because of that."""
    texts = [str(getattr(each, "cause", None) or each) for each in (getattr(error, "worker_failures", None) or {}).values()]
    for text in texts:
        host = found[1] if (found := re.search(r"hostname='([^']*)'", text)) else "a node"
        if "node has died" in text:
            return f"{host} is gone"
        if "worker process has died" in text:
            return f"a worker on {host} died"
    return f"a worker failed ({(texts or [str(error)])[0].strip().splitlines()[0][:200]})"


def _preflight(name: str, share: Share, sets: Sequence[tuple[str, str]], storage: str | None = None) -> None:
    """Among several nodes, what is wrong between them shows in seconds, and not as a worker's death. storage: where it writes."""
    while len(before := {node["NodeID"] for node in alive_nodes()}) > 1:
        try:
            with Nodes(share) as nodes:
                preflight(nodes, sets=sets, storage=storage, packages=tuple(versions()))
            return
        except ValueError:
            if before == {node["NodeID"] for node in alive_nodes()}:
                raise
            print(f"{name}: nodes came or went while they were looked at; looking again", flush=True)


def _cause(error) -> BaseException:
    """What a worker raised: a user's mistake stays one."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure
        if isinstance(inner, ValueError):
            return ValueError(str(inner))
    return error


def _work(config) -> None:
    """A worker's whole life. Ray is told of no checkpoint: a worker finds the newest one in the run's folder."""
    import ray.train
    import ray.train.torch

    job, context = config["job"], ray.train.get_context()
    threading.Thread(target=_end_when_cut_off, args=(ray.get_runtime_context().gcs_address,), daemon=True).start()
    rank, workers = context.get_world_rank(), context.get_world_size()
    group: dist.ProcessGroup | None = None
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    used = working(job.batch_size, workers)
    if used > 1:
        group = dist.new_group(list(range(used)))  # type: ignore[assignment]  # all must ask for it, those without a part too
    if job.url:  # this node may have another place for it than the driver's
        job = dataclasses.replace(job, folder=Mirror(job.url).folder)
    else:
        await_folder(job.folder)
    if rank < used:
        lock_timeout_s = _LOCK_TIMEOUT_AGAIN_S if config["again"] else LOCK_TIMEOUT_S
        store = CheckpointStore(job.folder, url=job.url, lock_timeout_s=lock_timeout_s)
        worker = Worker(store, ray.train.torch.get_device(), rank=rank, world_size=used, group=group)
        fit(_with_local_init(job), worker, _gauges(job) if rank == 0 else None)


def _with_local_init(job: Job) -> Job:
    """The job, with initial weights that lie on this node: those of a run at a URL are downloaded."""
    return dataclasses.replace(job, init=fetch_source(job.init))


def _end_when_cut_off(head: str) -> None:
    """End this process when it has not reached the head for too long. By then Ray has given the node up, and other workers go on
    with the run, as soon as its lock is free. Ray's own connection to the head finds out only after minutes."""
    host, _, port = head.rpartition(":")
    heard = time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CUT_OFF_S / 3).close()
            heard = time.monotonic()
        except OSError as error:
            if time.monotonic() - heard > _CUT_OFF_S:
                print(f"{head} has not been reached for {_CUT_OFF_S:.0f} s ({error}): this worker ends", flush=True)
                os._exit(1)
        time.sleep(_LOOK_S)


def _in_a_process_of_ray() -> bool:
    """Such as a study's trial. Whoever does without Ray has not imported it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _gauges(job: Job) -> Callable[[dict[str, float]], None]:
    """What offers each row as Ray's metrics. It notes the values in this process, which sends the newest every 10 s; they are
    gone 20 s after the process is."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}
    tags = {"run": shown_name(job.folder)}

    def set_gauges(row: dict[str, float]) -> None:
        for name, value in readings(row, job.steps).items():
            if name not in gauges:
                gauges[name] = Gauge(name, description=meaning(name), tag_keys=tuple(tags)).set_default_tags(tags)
            gauges[name].set(value)

    return set_gauges


def working(batch_size: int, workers: int) -> int:
    """How many of the workers have a part: the most that a global batch divides by, which must not depend on their number."""
    return max(n for n in range(1, workers + 1) if batch_size % n == 0)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
