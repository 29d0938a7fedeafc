"""Everything that knows Ray: a job on Ray Train workers, or in this process."""

import contextlib
import dataclasses
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from train.config import worker_range
from train.lease import await_lease
from train.loop import Job, fit, place_in, plain_place
from train.mirror import Mirror
from train.provenance import RECORD_NAME
from train.shares import Node, share_of

Common = TypeVar("Common")
Item = TypeVar("Item")
Result = TypeVar("Result")

# Before Ray is imported. A dead worker is seen after a second (2 otherwise); prints once; no line per rank; Ray's run API.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # of workers for which a node is missing that was there a moment ago
}
_RAY_NAME = "ray"  # under the run's folder, where Ray keeps its books
_WITHOUT_BF16 = {"K80", "P4", "P100", "T4", "V100"}  # as Ray names them


def run_job(job: Job, workers: str | int, gpus_per_worker: float | None = None, cpus_per_worker: int = 0) -> str:
    """Train the job to its end, going on from its newest checkpoint. Returns the device, in words.

    workers: of Ray Train, a number or LEAST:MOST; 0: this process, without Ray. A run may go on with others than it began with.
    gpus_per_worker: None is one where there are GPUs; 0 is none; a part of one leaves the rest to other runs. cpus_per_worker:
    0 is an equal share of all.
    Raises ValueError when a worker did, with its sentence, and where the cluster has not so much.
    """
    if worker_range(workers)[1] == 0:
        place = plain_place(job.folder, torch.device("cpu") if gpus_per_worker == 0 else None, url=job.url)
        with mirrored(job):
            fit(job, place)
        return _device_name(place.device)
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
    await_lease(mirror)
    yield
    mirror.pull(whole=True)


def map_on_workers(
    function: Callable[[Common, Item, str, int], Result],
    common: Common,
    items: Sequence[Item],
    *,
    workers: str | int,
    gpus_per_worker: float | None = None,
    cpus_per_worker: int = 0,
    threads: int | None = None,
) -> Iterator[tuple[int, Result]]:
    """Call function(common, item, device, threads) for each item, each exactly once, on as many workers at a time.

    workers: as for a job; 0 is this process, without Ray. common goes to a node once. Yields each item's place and result, as
    they come. What a worker was at when it died is done again by another.
    Raises ValueError when the function did, with its sentence, and where the cluster has not so many.
    """
    least, most = worker_range(workers)
    if most == 0:
        device = plain_place(Path(), torch.device("cpu") if gpus_per_worker == 0 else None).device.type
        for place, item in enumerate(items):
            yield place, function(common, item, device, threads or 0)
        return
    connect()
    import ray

    share = share_of(_nodes(), least, most, gpus_per_worker, cpus_per_worker, said=str(workers))
    call = ray.remote(_called).options(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=3)
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


def connect() -> None:
    """Join the cluster that this machine belongs to, or start Ray here. Says which."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    context = ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    place = context.dashboard_url
    nodes = len([node for node in ray.nodes() if node["Alive"]])
    resources = ray.cluster_resources()
    gpus = f", {resources['GPU']:.0f} GPUs" if resources.get("GPU") else ""
    print(f"Ray: {nodes} node{'s' * (nodes > 1)}, {resources['CPU']:.0f} CPUs{gpus}; dashboard http://{place}", flush=True)


def gpus_with_bf16(workers: str | int, gpus_per_worker: float | None = None) -> bool:
    """Whether such a job will find GPUs that compute in bf16 (Ampere and newer).

    This machine's own GPU answers that at once; without one, and with workers, the cluster is asked, which connects to it.
    """
    if gpus_per_worker == 0:
        return False
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if worker_range(workers)[1] == 0:
        return False
    connect()
    import ray

    resources = ray.cluster_resources()
    kinds = {name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")}
    return resources.get("GPU", 0) > 0 and not kinds & _WITHOUT_BF16


def _run_on_ray(job, workers, gpus_per_worker, cpus_per_worker):
    connect()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    least, most = worker_range(workers)
    share = share_of(_nodes(), least, most, gpus_per_worker, cpus_per_worker, said=str(workers))
    shutil.rmtree(job.folder / _RAY_NAME, ignore_errors=True)  # what Ray noted of an earlier attempt, which it would go on from
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": dataclasses.replace(job, threads=job.threads or share.cpus)},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
            use_gpu=share.gpus > 0,
            resources_per_worker={"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {}),
        ),
        run_config=RunConfig(
            name=_RAY_NAME, storage_path=str(job.folder), failure_config=FailureConfig(max_failures=job.max_failures)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    return f"{workers} x {'GPU' if share.gpus else 'CPU'}"


def _nodes() -> list[Node]:
    import ray

    each = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in each]


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
    rank, workers = context.get_world_rank(), context.get_world_size()
    group: dist.ProcessGroup | None = None
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    used = working(job.batch_size, workers)
    if used > 1:
        group = dist.new_group(list(range(used)))  # type: ignore[assignment]  # all must ask for it, those without a part too
    if job.url:  # this node may have another place for it than the driver's
        job = dataclasses.replace(job, folder=Mirror(job.url).folder)
    if rank < used:
        device = ray.train.torch.get_device()
        fit(job, place_in(job.folder, device, rank=rank, world_size=used, group=group, url=job.url))


def working(batch_size: int, workers: int) -> int:
    """How many of the workers have a part: the most that a global batch divides by, which must not depend on their number."""
    return max(n for n in range(1, workers + 1) if batch_size % n == 0)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
