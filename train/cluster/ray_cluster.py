"""The Ray cluster that this process has joined: its nodes, those that the autoscaler may add, and calls on each of them."""

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from sharding.cli import describe
from train.cluster.node_checks import CallResult, NodeActor
from train.cluster.resources import NodeResources, WorkerResources, node_resources, startable_nodes
from train.config import worker_range

# Before Ray is imported. A dead worker is seen after a second (2 otherwise); prints once; no line per rank; Ray's run API.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # for room on a node that was there a moment ago; then with what there is
}
_HEAD = "node:__internal_head__"  # a resource of the head node alone
_WITHOUT_BF16 = {"K80", "P4", "P100", "T4", "V100"}  # as Ray names them


def connect(name: str | None = None) -> None:
    """Join the cluster that this machine belongs to, or start Ray here. Says which. name: this job's in Ray's dashboard."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import ray

    if ray.is_initialized():
        return
    _listen_on_loopback()
    job = ray.job_config.JobConfig(metadata={"job_name": name} if name else None)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    context = ray.init(job_config=job, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints its stack and aborts
    with contextlib.suppress(FileNotFoundError):  # Ray writes it for everyone to read
        (Path.home() / ".ray" / "auth_token").chmod(0o600)
    place = context.dashboard_url
    nodes = len(alive_nodes())
    resources = ray.cluster_resources()
    gpus = f", {resources['GPU']:.0f} GPUs" if resources.get("GPU") else ""
    print(f"Ray: {nodes} node{'s' * (nodes > 1)}, {resources['CPU']:.0f} CPUs{gpus}; dashboard http://{place}", flush=True)


def _listen_on_loopback() -> None:
    """Have a Ray that is started here listen on loopback only: it serves this machine alone. Of a cluster that is joined, the
    addresses stay."""
    from ray._private import ray_constants, services

    if services.canonicalize_bootstrap_address(None) is None:  # type: ignore[arg-type]  # the stub does not know of None
        # Ray's own switch for systems whose firewall asks about every port.
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False


def possible_nodes() -> list[NodeResources]:
    """The cluster's nodes, and those that its autoscaler may still start."""
    there = [node_resources(node["Resources"]) for node in alive_nodes()]
    return [*there, *(node_resources(resources, started=False) for resources in _startable())]


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's own description of each node that is there."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _startable() -> list[dict[str, float]]:
    """Ray has no API for what its autoscaler may start. But the autoscaler runs on the head, where `ray submit` has its drivers
    too, with its configuration in its command line."""
    import ray

    address = ray.get_runtime_context().gcs_address
    workers = [node_resources(node["Resources"]) for node in alive_nodes() if _HEAD not in node["Resources"]]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            words = path.read_bytes().decode(errors="replace").split("\0")
            given = {flag: value for flag, _, value in (word.partition("=") for word in words)}
            config = given.get("--autoscaling-config")
            if config and given.get("--gcs-address") == address:
                return startable_nodes(yaml.safe_load(Path(config).expanduser().read_text()), workers)
    return []


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
    with_gpus = [each for each in [*(node["Resources"] for node in alive_nodes()), *_startable()] if each.get("GPU", 0) > 0]
    kinds = {name.removeprefix("accelerator_type:") for each in with_gpus for name in each}
    return bool(with_gpus) and not kinds & _WITHOUT_BF16


class NodeActors:
    """An actor on each of the cluster's alive nodes, in which functions can be called; they end with the block.

    They reserve nothing, so they start beside whatever runs. fitting: only nodes on which a worker with these resources fits.
    resources: each node's cores and GPUs as Ray counts them; addresses: by which others reach it. Both are by the node's name.
    """

    def __init__(self, fitting: WorkerResources | None = None):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.resources: dict[str, NodeResources] = {}
        self.addresses: dict[str, str] = {}
        self._actors: dict[str, Any] = {}
        for each in sorted(alive_nodes(), key=lambda each: each["NodeManagerAddress"]):
            node, address = node_resources(each["Resources"]), each["NodeManagerAddress"]
            if fitting and (node.gpus < fitting.gpus or node.cpus < fitting.cpus):
                continue
            name = address if address not in self.addresses.values() else f"{address}#{each['NodeID'][:6]}"
            place = NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
            start = ray.remote(NodeActor).options(num_cpus=0, max_concurrency=8, scheduling_strategy=place)
            self.resources[name], self.addresses[name], self._actors[name] = node, address, start.remote()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        import ray

        for actor in self._actors.values():
            ray.kill(actor)

    def call(
        self, function: Callable, *args: Any, timeout_s: float, per_node: Mapping[str, tuple] | None = None
    ) -> dict[str, CallResult]:
        """Call function(*args) on all nodes in parallel. per_node: only on these nodes, with further arguments for each.

        The result of a node that raises, has died, or has not answered by the time-out says so.
        """
        import ray

        further = {name: () for name in self._actors} if per_node is None else per_node
        calls = {name: self._actors[name].call.remote(function, *args, *own) for name, own in further.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
        results = {}
        for name, call in calls.items():
            try:
                results[name] = CallResult(ray.get(call, timeout=0))
            except ray.exceptions.GetTimeoutError:
                results[name] = CallResult(None, f"no answer within {timeout_s:g} s")
            except ray.exceptions.RayError as error:  # a process that lacks a module has Ray's whole traceback for a message
                missing = re.search(r"No module named \S+", str(error))
                results[name] = CallResult(None, missing[0] if missing else describe(getattr(error, "cause", None) or error))
        return results
