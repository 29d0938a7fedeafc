"""The resources of each worker: its cores, and its GPU or a fraction of one."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class NodeResources(NamedTuple):
    """A node's cores and GPUs, as whole numbers; started: it is there, and not only what the autoscaler may add."""

    cpus: int
    gpus: int
    started: bool = True


def node_resources(resources: Mapping[str, float], *, started: bool = True) -> NodeResources:
    """The node that has these resources, by Ray's names."""
    return NodeResources(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), started)


def startable_nodes(config: Mapping[str, Any], workers: Iterable[NodeResources]) -> list[dict[str, float]]:
    """The resources, by Ray's names, of each node that the autoscaler may still start, the ones with most GPUs first.

    config: as of cluster.yaml, and as the autoscaler has it: with the resources of each type of node filled in; workers: the
    nodes that are there, without the head. Ray does not say of which type they are, so one with as much as a type is taken for
    one of it. A type that does not say what it has, as of machines that a lab owns, adds nothing: its nodes are started at once.
    """
    most = config.get("max_workers", 0)
    found: list[dict[str, float]] = []
    for kind in config.get("available_node_types", {}).values():
        resources = kind.get("resources", {})
        if any(node_resources(resources)[:2]):
            found += [resources] * kind.get("max_workers", most)
    found.sort(key=lambda resources: node_resources(resources)[1::-1], reverse=True)
    there = list(workers)
    for node in there:
        same = (i for i, resources in enumerate(found) if node_resources(resources)[:2] == node[:2])
        if (i := next(same, None)) is not None:
            del found[i]
    return found[: max(0, most - len(there))]


class WorkerResources(NamedTuple):
    """What one worker reserves. gpus: 0, 1, or a part of one."""

    cpus: int
    gpus: float


def resources_per_worker(
    nodes: Iterable[NodeResources],
    least: int,
    most: int,
    gpus_per_worker: float | None,
    cpus_per_worker: int = 0,
    *,
    workers: str,
) -> WorkerResources:
    """The resources with which as many of `most` workers as possible fit, with as many cores each as that leaves.

    If workers have GPUs, only nodes with GPUs count: a head node without any may have more cores than all others.
    gpus_per_worker: None is one if the cluster has GPUs, else zero. cpus_per_worker: cores of each; 0: an equal share of all.
    workers: --workers as given, for messages.
    Raises ValueError if even `least` workers do not fit, and for a fraction of a GPU with several workers: NCCL refuses two ranks
    on one GPU.
    """
    nodes = list(nodes)
    gpus = (1.0 if any(node.gpus for node in nodes) else 0.0) if gpus_per_worker is None else gpus_per_worker
    if not 0 <= gpus <= 1:
        raise ValueError(f"--gpus-per-worker {gpus:g}: give 0 (train on CPUs), 1, or a fraction such as 0.25")
    if 0 < gpus < 1 and most > 1:
        raise ValueError(
            f"--gpus-per-worker {gpus:g} with --workers {workers}: workers of one run cannot share a GPU; give --workers 1"
        )
    usable = [node for node in nodes if node.gpus] if gpus else nodes
    limits = [int(node.gpus / gpus + 1e-9) if gpus else node.cpus for node in usable]

    def fit(cpus: int) -> int:
        return sum(min(limit, node.cpus // cpus) for limit, node in zip(limits, usable, strict=True))

    if cpus_per_worker < 0:
        raise ValueError(f"--cpus-per-worker {cpus_per_worker}: give a number of cores, or 0 for an equal share of all")
    room = fit(max(1, cpus_per_worker))
    if room < least:
        what = f"{sum(node.gpus for node in nodes)} GPUs" if gpus else f"{sum(node.cpus for node in nodes)} CPUs"
        each = f"{gpus:g} of them" if gpus and gpus < 1 else "one" if gpus else "at least one"
        if cpus_per_worker > 1:
            each += f" and {cpus_per_worker} of its {sum(node.cpus for node in nodes)} CPUs"
        has = "has" if all(node.started for node in nodes) else "can grow to"
        raise ValueError(f"--workers {workers}: the cluster {has} {what}, and each worker takes {each}")
    if cpus_per_worker:
        return WorkerResources(cpus_per_worker, gpus)
    wanted = min(most, room)
    return WorkerResources(max(cpus for cpus in range(1, max(node.cpus for node in usable) + 1) if fit(cpus) >= wanted), gpus)
