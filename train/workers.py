"""Everything that knows Ray: a job on Ray Train workers, or in this process."""

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml

from sharding.command import describe
from train.checkup import preflight
from train.config import worker_range
from train.gauges import meaning, readings, shown_name
from train.lease import await_lease
from train.loop import Job, fit, place_in, plain_place
from train.mirror import Mirror
from train.nodes import Answer, Caller
from train.provenance import RECORD_NAME
from train.runs import versions
from train.shares import Node, Share, node_of, share_of, startable

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
_HEAD = "node:__internal_head__"  # a resource of the head node alone
_BOOKS = "ray"  # under the run's folder, where Ray keeps its own
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
            fit(job, place, _gauges(job) if _in_a_process_of_ray() else None)
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

    share = share_of(possible_nodes(), least, most, gpus_per_worker, cpus_per_worker, said=str(workers))
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


class Nodes:
    """A process of ours on each of the cluster's alive nodes, in which functions can be called; at the block's end they end.

    Nothing is reserved for them, so they start beside whatever runs. share: only the nodes on which a worker with it fits.
    shares: each node's cores and GPUs as Ray counts them; addresses: by which others reach it. Both are by the node's name.
    """

    def __init__(self, share: Share | None = None):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.shares: dict[str, Node] = {}
        self.addresses: dict[str, str] = {}
        self._callers: dict[str, Any] = {}
        for each in sorted(_alive(), key=lambda each: each["NodeManagerAddress"]):
            node, address = node_of(each["Resources"]), each["NodeManagerAddress"]
            if share and (node.gpus < share.gpus or node.cpus < share.cpus):
                continue
            name = address if address not in self.addresses.values() else f"{address}#{each['NodeID'][:6]}"
            place = NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
            start = ray.remote(Caller).options(num_cpus=0, max_concurrency=8, scheduling_strategy=place)
            self.shares[name], self.addresses[name], self._callers[name] = node, address, start.remote()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        import ray

        for caller in self._callers.values():
            ray.kill(caller)

    def ask(self, function: Callable, *given: Any, seconds: float, each: Mapping[str, tuple] | None = None) -> dict[str, Answer]:
        """Call function(*given) on every node at once; with `each`, on those in it, and with what it has for them besides.

        A node that raises, has gone, or has not answered after so many seconds says that in its answer.
        """
        import ray

        asked = {name: () for name in self._callers} if each is None else each
        calls = {name: self._callers[name].call.remote(function, *given, *own) for name, own in asked.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds)
        answers = {}
        for name, call in calls.items():
            try:
                answers[name] = Answer(ray.get(call, timeout=0))
            except ray.exceptions.GetTimeoutError:
                answers[name] = Answer(None, f"no answer within {seconds:g} s")
            except ray.exceptions.RayError as error:  # a process that lacks a module has Ray's whole traceback for a message
                missing = re.search(r"No module named \S+", str(error))
                answers[name] = Answer(None, missing[0] if missing else describe(getattr(error, "cause", None) or error))
        return answers


def connect(name: str | None = None) -> None:
    """Join the cluster that this machine belongs to, or start Ray here. Says which. name: this job's in Ray's dashboard."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import ray

    if ray.is_initialized():
        return
    job = ray.job_config.JobConfig(metadata={"job_name": name} if name else None)
    context = ray.init(job_config=job, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    place = context.dashboard_url
    nodes = len([node for node in ray.nodes() if node["Alive"]])
    resources = ray.cluster_resources()
    gpus = f", {resources['GPU']:.0f} GPUs" if resources.get("GPU") else ""
    print(f"Ray: {nodes} node{'s' * (nodes > 1)}, {resources['CPU']:.0f} CPUs{gpus}; dashboard http://{place}", flush=True)


def gpus_with_bf16(workers: str | int, gpus_per_worker: float | None = None, *, name: str | None = None) -> bool:
    """Whether such a job will find GPUs that compute in bf16 (Ampere and newer).

    This machine's own GPU answers that at once; without one, and with workers, the cluster is asked, which connects to it, by
    this name.
    """
    if gpus_per_worker == 0:
        return False
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if worker_range(workers)[1] == 0:
        return False
    connect(name)
    with_gpus = [each for each in [*(node["Resources"] for node in _alive()), *_startable()] if each.get("GPU", 0) > 0]
    kinds = {name.removeprefix("accelerator_type:") for each in with_gpus for name in each}
    return bool(with_gpus) and not kinds & _WITHOUT_BF16


def _run_on_ray(job, workers, gpus_per_worker, cpus_per_worker):
    connect(shown_name(job.folder))
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    least, most = worker_range(workers)
    share = share_of(possible_nodes(), least, most, gpus_per_worker, cpus_per_worker, said=str(workers))
    _preflight(job, share)
    shutil.rmtree(job.folder / _BOOKS, ignore_errors=True)  # what Ray noted of an earlier attempt, which it would go on from
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": dataclasses.replace(job, threads=job.threads or share.cpus)},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
            use_gpu=share.gpus > 0,
            resources_per_worker={"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {}),
        ),
        run_config=RunConfig(
            name=shown_name(job.folder),
            storage_path=str(job.folder / _BOOKS),
            failure_config=FailureConfig(max_failures=job.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    return f"{workers} x {'GPU' if share.gpus else 'CPU'}"


def _preflight(job, share) -> None:
    """Among several nodes, what is wrong between them shows in seconds, and not as a worker's death."""
    if len(_alive()) > 1:
        with Nodes(share) as nodes:
            sets = [(each.shards, each.fingerprint) for each in job.input.sets]
            preflight(nodes, sets=sets, storage=job.url or str(job.folder), packages=tuple(versions()))


def possible_nodes() -> list[Node]:
    """The cluster's nodes, and those that its autoscaler may still start."""
    there = [node_of(node["Resources"]) for node in _alive()]
    return [*there, *(node_of(resources, started=False) for resources in _startable())]


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _startable() -> list[dict[str, float]]:
    """Ray tells nobody what its autoscaler may start. But the autoscaler runs on the head, where `ray submit` has its drivers
    too, with its configuration in its command line."""
    import ray

    address = ray.get_runtime_context().gcs_address
    workers = [node_of(node["Resources"]) for node in _alive() if _HEAD not in node["Resources"]]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            said = path.read_bytes().decode(errors="replace").split("\0")
            given = {flag: value for flag, _, value in (word.partition("=") for word in said)}
            config = given.get("--autoscaling-config")
            if config and given.get("--gcs-address") == address:
                return startable(yaml.safe_load(Path(config).expanduser().read_text()), workers)
    return []


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
        tell = _gauges(job) if rank == 0 else None
        fit(job, place_in(job.folder, device, rank=rank, world_size=used, group=group, url=job.url), tell)


def _in_a_process_of_ray() -> bool:
    """Such as a study's trial. Whoever does without Ray has not imported it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _gauges(job: Job) -> Callable[[dict[str, float]], None]:
    """What offers each row as Ray's metrics. It notes the values in this process, which sends the newest every 10 s; they are
    gone 20 s after the process is."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}
    tags = {"run": shown_name(job.folder)}

    def tell(row: dict[str, float]) -> None:
        for name, value in readings(row, job.steps).items():
            if name not in gauges:
                gauges[name] = Gauge(name, description=meaning(name), tag_keys=tuple(tags)).set_default_tags(tags)
            gauges[name].set(value)

    return tell


def working(batch_size: int, workers: int) -> int:
    """How many of the workers have a part: the most that a global batch divides by, which must not depend on their number."""
    return max(n for n in range(1, workers + 1) if batch_size % n == 0)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
