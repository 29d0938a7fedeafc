"""Runs a training job on Ray Train workers or in this process, and maps functions over workers."""

import contextlib
import dataclasses
import itertools
import os
import pickle
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

from sharding.cli import describe, without_addresses
from train.cluster.diagnostics import preflight
from train.cluster.ray_cluster import NodeActors, alive_nodes, connect, possible_nodes
from train.cluster.resources import WorkerResources, resources_per_worker
from train.cluster.worker_entry import run_pickled
from train.config import worker_range
from train.records.checkpoints import CheckpointStore
from train.records.remote_run import Mirror, fetch_source
from train.records.retry import await_folder
from train.records.run_lock import StoreLock
from train.records.runs import versions
from train.records.uploader import LOCK_TIMEOUT_S
from train.trainer.loop import Job, fit
from train.trainer.precision import device_name
from train.trainer.prometheus import meaning, readings, shown_name
from train.trainer.worker import Worker, single_worker

Common = TypeVar("Common")
Item = TypeVar("Item")
Result = TypeVar("Result")

_RAY_FOLDER = "ray"  # Ray's own files, in the run's folder
_PAUSE_S = 15.0  # before the next attempt, longer by as much for each further failure without a new checkpoint, up to
_MAX_PAUSE_S = 60.0
_CUT_OFF_S = 15.0  # a worker that cannot reach the head for so long ends
_HEAD_POLL_S = 2.0
_LOCK_TIMEOUT_AGAIN_S = 120.0  # a worker of the previous attempt may continue for so long when it is cut off (docs/cluster.md)


def run_job(job: Job, workers: str | int, gpus_per_worker: float | None = None, cpus_per_worker: int = 0) -> str:
    """Train the job to its end, from its newest checkpoint. Returns the device as text.

    workers: of Ray Train, a number or MIN:MAX; 0: this process, without Ray. A run may continue with another number.
    gpus_per_worker: None: one if the cluster has GPUs; 0: none; a fraction leaves the rest to other runs. cpus_per_worker: 0: an
    equal share of all.
    Raises ValueError with the message of a worker's ValueError, and if the cluster lacks these resources.
    """
    if worker_range(workers)[1] == 0:
        worker = single_worker(job.folder, torch.device("cpu") if gpus_per_worker == 0 else None, url=job.url)
        with mirrored(job):
            fit(_with_local_init(job), worker, _gauges(job) if _is_ray_process() else None)
        return device_name(worker.device)
    with mirrored(job):
        return _run_on_ray(job, workers, gpus_per_worker, cpus_per_worker)


@contextlib.contextmanager
def mirrored(job: Job) -> Iterator[None]:
    """A block in which the job is trained, on any nodes. For a run at a URL, it first waits until no other process trains the
    run; at the end it downloads the workers' files."""
    if job.url is None:
        yield
        return
    mirror = Mirror(job.url)
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
    """Call function(common, item, device, threads) once for each item, in parallel on the workers.

    sets: folder or URL, and fingerprint, of each shard set that it reads. workers: as for a job; 0: this process, without
    Ray. common is sent to each node once. Yields each item's index and result, as they finish. If a worker dies, another one
    processes its item again.
    Raises ValueError with the message of the function's ValueError, and if the cluster lacks these resources.
    """
    least, most = worker_range(workers)
    if most == 0:
        device = "cuda" if gpus_per_worker != 0 and torch.cuda.is_available() else "cpu"
        for place, item in enumerate(items):
            yield place, function(common, item, device, threads or 0)
        return
    connect()
    import ray

    per_worker = resources_per_worker(possible_nodes(), least, most, gpus_per_worker, cpus_per_worker, workers=str(workers))
    _preflight("workers", per_worker, sets)
    call = ray.remote(_called).options(name=function.__name__, num_cpus=per_worker.cpus, num_gpus=per_worker.gpus, max_retries=3)
    device = "cuda" if per_worker.gpus else "cpu"
    shared, left = ray.put(common), iter(enumerate(items))
    running = {
        call.remote(function, shared, item, device, threads or per_worker.cpus): place
        for place, item in itertools.islice(left, most)
    }
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            place = running.pop(done)
            for following, item in itertools.islice(left, 1):
                running[call.remote(function, shared, item, device, threads or per_worker.cpus)] = following
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
    per_worker = resources_per_worker(possible_nodes(), least, most, gpus_per_worker, cpus_per_worker, workers=str(workers))
    sets = [(each.shards, each.fingerprint) for each in job.input.sets]
    _preflight(job.folder.name, per_worker, sets, storage=job.url or str(job.folder))
    job.folder.mkdir(parents=True, exist_ok=True)
    _retry_attempts(job, lambda again: _attempt(job, least, most, per_worker, again=again))
    return f"{workers} x {'GPU' if per_worker.gpus else 'CPU'}"


def _retry_attempts(job: Job, attempt: Callable[[bool], BaseException | None]) -> None:
    """Repeat attempts until one succeeds. attempt: is given whether an earlier one failed, and returns its error.

    Failures are counted until a new checkpoint follows. Raises the error once they exceed the job's limit, and a ValueError at
    once, since a user's mistake would only fail again.
    """
    failures, newest = 0, _newest_checkpoint(job)
    while (error := attempt(failures > 0)) is not None:
        before, newest = newest, _newest_checkpoint(job)
        failures = 1 if newest != before else failures + 1
        if isinstance(error, ValueError) or failures > job.max_failures:
            raise error
        print(
            f"{job.folder.name}: {_reason(error)}; resuming from {newest or 'the beginning'} (failure {failures} of at most"
            f" {job.max_failures} without a new checkpoint)",
            flush=True,
        )
        time.sleep(min(_PAUSE_S * (failures - 1), _MAX_PAUSE_S))


def _attempt(job, least, most, per_worker, *, again) -> BaseException | None:
    """Train on workers until the end, or until one of them fails. Returns its error.

    Ray restarts workers after a node's preemption and waits for missing nodes, but it counts all other failures of a run, however
    long ago, so the caller handles those. again: workers of an earlier attempt may still be alive.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    await_folder(job.folder)
    shutil.rmtree(job.folder / _RAY_FOLDER, ignore_errors=True)  # state of an earlier attempt, from which Ray would continue
    job = dataclasses.replace(job, threads=job.threads or per_worker.cpus)
    trainer = TorchTrainer(
        run_pickled,
        train_loop_config={"call": pickle.dumps((_work, {"job": job, "again": again}))},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
            use_gpu=per_worker.gpus > 0,
            resources_per_worker={"CPU": per_worker.cpus} | ({"GPU": per_worker.gpus} if per_worker.gpus else {}),
        ),
        run_config=RunConfig(
            name=shown_name(job.folder),
            storage_path=str(job.folder / _RAY_FOLDER),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except SystemExit:  # what Ray Train makes of Ctrl-C, once the workers have ended
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        cause = _cause(error)
        cause.__cause__ = None if cause is error else error
        return cause
    return None


def steps_done(job: Job) -> int:
    """The step of the newest checkpoint, from which the job resumes; 0 without one."""
    newest = _newest_checkpoint(job)
    return int(newest.rpartition("-")[2]) if newest else 0


def _newest_checkpoint(job) -> str | None:
    return CheckpointStore(job.folder, url=job.url).newest()


def _reason(error) -> str:
    """Why an attempt failed, in a few words. When one worker dies, the others fail because of it."""
    texts = [str(getattr(each, "cause", None) or each) for each in (getattr(error, "worker_failures", None) or {}).values()]
    for text in texts:
        host = found[1] if (found := re.search(r"hostname='([^']*)'", text)) else "a node"
        if "node has died" in text:
            return f"{host} is gone"
        if "worker process has died" in text:
            return f"a worker on {host} died"
    first_line = (texts or [str(error)])[0].strip().splitlines()[0]
    return f"a worker failed ({without_addresses(first_line)[:200]})"


def _preflight(name: str, per_worker: WorkerResources, sets: Sequence[tuple[str, str]], storage: str | None = None) -> None:
    """Check the nodes if there are several, so that a problem is reported in seconds. storage: where the workers write."""
    while len(before := {node["NodeID"] for node in alive_nodes()}) > 1:
        try:
            with NodeActors(per_worker) as nodes:
                preflight(nodes, sets=sets, storage=storage, packages=tuple(versions()))
            return
        except ValueError:
            if before == {node["NodeID"] for node in alive_nodes()}:
                raise
            print(f"{name}: nodes joined or left during the checks; checking again", flush=True)


def _cause(error) -> BaseException:
    """The error of a worker; a user's mistake stays a ValueError."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure
        if isinstance(inner, ValueError):
            return ValueError(str(inner))
    return error


def _work(config) -> None:
    """The function of a Ray Train worker. Checkpoints are not reported to Ray: a worker finds the newest in the run's folder."""
    import ray.train
    import ray.train.torch

    job, context = config["job"], ray.train.get_context()
    threading.Thread(target=_end_when_cut_off, args=(ray.get_runtime_context().gcs_address,), daemon=True).start()
    rank, workers = context.get_world_rank(), context.get_world_size()
    group: dist.ProcessGroup | None = None
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    used = usable_workers(job.batch_size, workers)
    if used > 1:
        group = dist.new_group(list(range(used)))  # type: ignore[assignment]  # every rank must call it, also those outside the group
    if job.url:  # this node's folder may differ from the driver's
        job = dataclasses.replace(job, folder=Mirror(job.url).folder)
    else:
        await_folder(job.folder)
    if rank < used:
        lock_timeout_s = _LOCK_TIMEOUT_AGAIN_S if config["again"] else LOCK_TIMEOUT_S
        store = CheckpointStore(job.folder, url=job.url, lock_timeout_s=lock_timeout_s)
        worker = Worker(store, ray.train.torch.get_device(), rank=rank, world_size=used, group=group)
        fit(_with_local_init(job), worker, _gauges(job) if rank == 0 else None)


def _with_local_init(job: Job) -> Job:
    """The job with initial weights on this node: those of a run at a URL are downloaded."""
    return dataclasses.replace(job, init=fetch_source(job.init))


def _end_when_cut_off(head: str) -> None:
    """End this process when it cannot reach the head for too long. By then Ray has given the node up, and other workers continue
    the run once its lock is free. Ray's own connection to the head fails only after minutes."""
    host, _, port = head.rpartition(":")
    heard = time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CUT_OFF_S / 3).close()
            heard = time.monotonic()
        except OSError as error:
            if time.monotonic() - heard > _CUT_OFF_S:
                print(f"{head} could not be reached for {_CUT_OFF_S:.0f} s ({describe(error)}): this worker exits", flush=True)
                os._exit(1)
        time.sleep(_HEAD_POLL_S)


def _is_ray_process() -> bool:
    """Whether this is a Ray process, such as a study's trial. Processes that do not use Ray have not imported it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _gauges(job: Job) -> Callable[[dict[str, float]], None]:
    """A function that exports each row as Ray metrics. Ray sends the newest values every 10 s, and drops them 20 s after this
    process has ended."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}
    tags = {"run": shown_name(job.folder)}

    def set_gauges(row: dict[str, float]) -> None:
        for name, value in readings(row, job.steps).items():
            if name not in gauges:
                gauges[name] = Gauge(name, description=meaning(name), tag_keys=tuple(tags)).set_default_tags(tags)
            gauges[name].set(value)

    return set_gauges


def usable_workers(batch_size: int, workers: int) -> int:
    """The number of workers that train: the largest that divides the global batch, whose size must not depend on it."""
    return max(n for n in range(1, workers + 1) if batch_size % n == 0)
