"""Everything that knows Ray: a job on Ray Train workers, or in this process."""

import logging
import os
import shutil

import torch
import torch.distributed as dist

from train.config import worker_range
from train.loop import Job, fit, place_in, plain_place

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


def run_job(job: Job, workers: str | int) -> str:
    """Train the job to its end, going on from its newest checkpoint. Returns the device, in words.

    workers: of Ray Train, a number or LEAST:MOST; 0: this process, without Ray. A run may go on with others than it began with.
    Raises ValueError when a worker did, with its sentence.
    """
    if worker_range(workers)[1] == 0:
        place = plain_place(job.folder)
        fit(job, place)
        return _device_name(place.device)
    return _run_on_ray(job, workers)


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


def gpus_with_bf16(workers: str | int) -> bool:
    """Whether a job of so many workers will find GPUs that compute in bf16 (Ampere and newer).

    This machine's own GPU answers that at once; without one, and with workers, the cluster is asked, which connects to it.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if worker_range(workers)[1] == 0:
        return False
    connect()
    import ray

    resources = ray.cluster_resources()
    kinds = {name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")}
    return resources.get("GPU", 0) > 0 and not kinds & _WITHOUT_BF16


def _run_on_ray(job, workers):
    connect()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources, (least, most) = ray.cluster_resources(), worker_range(workers)
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if gpus and least > gpus:
        raise ValueError(f"--workers {workers}: the cluster has {gpus} GPUs, and each worker takes one")
    if least > cpus:
        raise ValueError(f"--workers {workers}: the cluster has {cpus} CPUs, and each worker takes at least one")
    each = {"CPU": max(1, cpus // most)} | ({"GPU": 1} if gpus else {})
    shutil.rmtree(job.folder / _RAY_NAME, ignore_errors=True)  # what Ray noted of an earlier attempt, which it would go on from
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
            use_gpu=gpus > 0,
            resources_per_worker=each,
        ),
        run_config=RunConfig(
            name=_RAY_NAME, storage_path=str(job.folder), failure_config=FailureConfig(max_failures=job.max_failures)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    return f"{workers} x {'GPU' if gpus else 'CPU'}"


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
    if rank < used:
        fit(job, place_in(job.folder, ray.train.torch.get_device(), rank=rank, world_size=used, group=group))


def working(batch_size: int, workers: int) -> int:
    """How many of the workers have a part: the most that a global batch divides by, which must not depend on their number."""
    return max(n for n in range(1, workers + 1) if batch_size % n == 0)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
