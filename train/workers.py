"""Everything that knows Ray: a job on Ray Train workers, or in this process."""

import contextlib
import functools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from train.checkpoints import saying_where
from train.loop import Job, Place, fit, plain_place

# Before Ray is imported. Quick reports (2 s each otherwise), prints once, no line per report and rank, Ray's run API.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}
_RAY_NAME = "checkpoints"  # Ray keeps its run under the folder's `checkpoints`
_WITHOUT_BF16 = {"K80", "P4", "P100", "T4", "V100"}  # as Ray names them


def run_job(job: Job, workers: int) -> str:
    """Train the job to its end, going on from its newest checkpoint. Returns the device, in words.

    workers: Ray Train workers; 0: this process, without Ray. Raises ValueError when a worker did, with its sentence, and
    when the run was begun the other way.
    """
    begun_with_ray = (job.folder / _RAY_NAME / "checkpoint_manager_snapshot.json").exists()
    begun_without = any((job.folder / "checkpoints").glob("step-*"))
    if workers == 0:
        if begun_with_ray:
            raise ValueError(f"{job.folder.name} was begun on Ray workers: go on with --workers 1 or more, not 0")
        place = plain_place(job.folder)
        fit(job, place)
        return _device_name(place.device)
    if begun_without:
        raise ValueError(f"{job.folder.name} was begun without Ray: go on with --workers 0, or choose another --name")
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


def gpus_with_bf16(workers: int) -> bool:
    """Whether a job of so many workers will find GPUs that compute in bf16 (Ampere and newer).

    This machine's own GPU answers that at once; without one, and with workers, the cluster is asked, which connects to it.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if workers == 0:
        return False
    connect()
    import ray

    resources = ray.cluster_resources()
    kinds = {name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")}
    return resources.get("GPU", 0) > 0 and not kinds & _WITHOUT_BF16


def _run_on_ray(job, workers):
    connect()
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if gpus and workers > gpus:
        raise ValueError(f"--workers {workers}: the cluster has {gpus} GPUs, and each worker takes one")
    if workers > cpus:
        raise ValueError(f"--workers {workers}: the cluster has {cpus} CPUs, and each worker takes at least one")
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus // workers} | ({"GPU": 1} if gpus else {})
        ),
        run_config=RunConfig(
            name=_RAY_NAME,
            storage_path=str(job.folder),
            failure_config=FailureConfig(max_failures=job.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
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
    """A worker's whole life."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    writing = threading.Lock()  # held while this worker's checkpoint is written

    def wait(seconds: float | None) -> None:
        if writing.acquire(timeout=-1 if seconds is None else seconds):
            writing.release()

    fit(
        config["job"],
        Place(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=device,
            group=dist.group.WORLD if context.get_world_size() > 1 else None,
            save=functools.partial(_save, writing),
            wait=wait,
            restore=_restore,
        ),
    )


def _save(writing: threading.Lock, step: int, write: Callable[[Path], None]) -> None:
    """Report to Ray, together with all ranks; rank 0's checkpoint is written and uploaded by a thread of Ray's.

    An error there ends the worker. Ray takes a checkpoint for one only when it is whole, and waits for the last at the end.
    """
    import ray.train

    context, mode = ray.train.get_context(), ray.train.CheckpointUploadMode.ASYNC
    if context.get_world_rank() > 0:
        ray.train.report({"step": step}, checkpoint_upload_mode=mode)
        return
    storage = context.get_storage()

    def upload(checkpoint, name: str):
        try:
            with writing, saying_where(storage.experiment_fs_path):
                write(Path(checkpoint.path))
                return storage.persist_current_checkpoint(checkpoint, name)
        finally:
            shutil.rmtree(checkpoint.path, ignore_errors=True)

    ray.train.report(
        {"step": step},
        checkpoint=ray.train.Checkpoint.from_directory(tempfile.mkdtemp()),
        checkpoint_upload_mode=mode,
        checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=False,  # `upload` does it, also when it fails
    )


@contextlib.contextmanager
def _restore() -> Iterator[Path | None]:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
