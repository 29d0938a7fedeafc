"""Check whether a cluster is fit for a run: one finding per check, with a way out.

Every wait has a time-out, so a node or a store that hangs becomes a finding too.
"""

import contextlib
import functools
import io
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec

from pipelines.remote_folder import is_url
from sharding.cli import describe
from train.cluster import node_checks
from train.cluster.node_checks import CallResult
from train.cluster.ray_cluster import NodeActors
from train.cluster.resources import NodeResources, resources_per_worker
from train.config import worker_range

STORAGE_TIMEOUT_S = 20.0  # for a folder or a store
VISIBILITY_TIMEOUT_S = 5.0  # until a node sees what another wrote: NFS caches a folder for longer than that only if told to
MAX_CLOCK_SKEW_S = 1.0  # the lock of a run at a URL (train/records/run_lock.py) fails at 30
MIN_FREE_BYTES = 10 * 2**30  # some checkpoints of a large backbone, some shards
MIN_SHARED_MEMORY_BYTES = 2**30  # for NCCL and Ray's object store; Docker's default is 64 MiB

_DRIVER = "this process"
_INSTALL = "bring every node to one commit of this project and install it there (pip install -e . -c constraints.txt)"
_VERSIONS_SHOWN = ("code", "python", "torch", "ray", "nvidia-dali-cuda130")
_ROUND_TRIPS = 3  # per clock; the fastest one counts

Status = Literal["ok", "warning", "FAILED"]
Arguments = ParamSpec("Arguments")


class Finding(NamedTuple):
    """The result of one check. text: what was found and, unless the status is ok, what to do."""

    check: str
    status: Status
    text: str

    def __str__(self) -> str:
        return f"{self.status:<8} {self.check:<13} {self.text}"


class _Problem(Exception):
    """What a check found wrong, and what to do."""

    def __init__(self, text: str, status: Status = "FAILED"):
        super().__init__(text)
        self.status = status


class _NodeError(Exception):
    """Nodes on which a call failed, and why."""


def _check(name: str, hint: str = "") -> Callable[[Callable[Arguments, str]], Callable[Arguments, Finding]]:
    """Decorate a check, which returns its "ok" text or raises a problem. hint: what to do when a call fails on a node."""

    def decorate(check: Callable[Arguments, str]) -> Callable[Arguments, Finding]:
        @functools.wraps(check)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Finding:
            try:
                return Finding(name, "ok", check(*args, **kwargs))
            except _NodeError as error:
                return Finding(name, "FAILED", f"{error}: {hint}")
            except _Problem as problem:
                return Finding(name, problem.status, str(problem))

        return checked

    return decorate


def examine(
    cluster: NodeActors,
    *,
    data: str | None,
    storage: str,
    workers: str | int,
    possible: Iterable[NodeResources],
    packages: Sequence[str],
    commit: str,
) -> Iterator[Finding]:
    """All findings, each as soon as it is made.

    data: a shard set's absolute folder or URL; storage: the same for runs; workers: as in --workers, 0 skips that check;
    possible: all nodes that the cluster can have; packages: whose versions must be equal; commit: of this code, to be shown.
    """
    if worker_range(workers)[1]:
        yield check_workers(possible, workers)
    yield check_versions(cluster, packages, commit=commit)
    yield check_storage(cluster, storage)
    image = None
    if data is not None:
        local = _call_here(node_checks.sample_shards, data)
        image = local.value.image if local.value else None
        yield check_shards(cluster, data, local=local)
    yield check_gpus(cluster)
    yield check_decoding(cluster, image)
    yield check_ports(cluster)
    yield check_all_reduce(cluster, "gloo", list(cluster.resources))
    if with_gpus := [name for name, node in cluster.resources.items() if node.gpus]:
        yield check_all_reduce(cluster, "nccl", with_gpus)
    yield check_clocks(cluster)
    yield check_free_space(cluster, storage, cached=is_url(data) or is_url(storage))
    yield check_shared_memory(cluster)


def preflight(cluster: NodeActors, *, sets: Iterable[tuple[str, str]], storage: str | None, packages: Sequence[str]) -> None:
    """Check versions, storage and shards before a run. Prints nothing.

    sets: folder or URL, and fingerprint, of each shard set; storage: the run's own folder or URL; None if workers write nothing.
    Raises ValueError with the first finding that failed.
    """

    def findings() -> Iterator[Finding]:
        yield check_versions(cluster, packages)
        if storage is not None:
            yield check_storage(cluster, storage)
        for shards, fingerprint in sets:
            yield check_shards(cluster, shards, fingerprint)

    for found in findings():
        if found.status == "FAILED":
            raise ValueError(f"{found.check}: {found.text}. Nothing was started; python train/doctor.py runs all other checks")


@_check("workers")
def check_workers(possible: Iterable[NodeResources], workers: str | int) -> str:
    """That many workers are available."""
    try:
        each = resources_per_worker(possible, *worker_range(workers), None, workers=str(workers))
    except ValueError as error:
        raise _Problem(f"{error}: ask for fewer, or add nodes") from error
    return f"{workers}, each with {each.cpus} CPUs{f' and {each.gpus:g} GPU' if each.gpus else ''}"


@_check("versions", _INSTALL)
def check_versions(cluster: NodeActors, packages: Sequence[str], *, commit: str = "") -> str:
    """Python, packages and code are the same on every node as in this process."""
    own = node_checks.installed_versions(packages)
    versions = {_DRIVER: own, **_values(cluster.call(node_checks.installed_versions, tuple(packages), timeout_s=20))}
    differing = []
    for package in own:
        if len(nodes_of := _nodes_by_value({name: each[package] for name, each in versions.items()})) > 1:
            differing.append(f"{package} {' and '.join(f'{value} ({nodes})' for value, nodes in nodes_of.items())}")
    if differing:
        raise _Problem(f"not the same everywhere: {'; '.join(differing)}: {_INSTALL}")
    shown = ", ".join(f"{name} {own[name]}" for name in _VERSIONS_SHOWN if name in own)
    return f"{shown}; {len(packages)} packages are equal{f' (commit {commit[:12]})' if commit else ''}"


@_check(
    "storage",
    "give --storage a folder that all nodes have at this path and may write to (NFS), or a URL (s3://bucket/runs)",
)
def check_storage(cluster: NodeActors, storage: str) -> str:
    """Every node can write there, and sees what the others wrote."""
    folder = f".doctor-{secrets.token_hex(4)}"
    files = {name: f"node-{i}" for i, name in enumerate(cluster.resources)}
    nodes = {"driver": _DRIVER} | {file: name for name, file in files.items()}
    existed = is_url(storage) or Path(storage).exists()
    try:
        _values({_DRIVER: _call_here(node_checks.write_test_file, storage, folder, True, "driver")})
        per_node = {name: (file,) for name, file in files.items()}
        _values(cluster.call(node_checks.write_test_file, storage, folder, False, timeout_s=30, per_node=per_node))
        args = node_checks.missing_test_files, storage, folder, tuple(nodes), VISIBILITY_TIMEOUT_S
        missing = {_DRIVER: _call_here(*args), **cluster.call(*args, timeout_s=STORAGE_TIMEOUT_S)}
        wrong = _errors(missing)
        for name, found in missing.items():
            if found.value:
                wrong.append(f"{name} does not see what {', '.join(nodes[file] for file in found.value)} wrote")
        if wrong:
            raise _Problem(f"{storage} is not one storage for all nodes: {'; '.join(wrong)}: mount it from one server")
    finally:
        _call_here(node_checks.remove_test_files, storage, folder)
        if not existed:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                Path(storage).rmdir()
    return f"{storage} is written to and read by {_node_count(cluster)}"


@_check("shards", "give --data a folder that all nodes have at this path, or a URL (s3://bucket/kidney)")
def check_shards(cluster: NodeActors, shards: str, fingerprint: str | None = None, *, local: CallResult | None = None) -> str:
    """Every node can read the set, and it is the same one.

    fingerprint: that it must have; local: what this process read of it, if it has already.
    """
    sample = node_checks.sample_shards
    samples = {_DRIVER: local or _call_here(sample, shards), **cluster.call(sample, shards, timeout_s=STORAGE_TIMEOUT_S)}
    found = {name: each.fingerprint[:12] for name, each in _values(samples).items()}
    nodes_of = _nodes_by_value(found | ({"the run": fingerprint[:12]} if fingerprint else {}))
    if len(nodes_of) > 1:
        differing = " and ".join(f"{value} ({nodes})" for value, nodes in nodes_of.items())
        raise _Problem(f"{shards} is not the same set everywhere, by its fingerprint: {differing}: copy it again from one place")
    return f"{shards} is read by {_node_count(cluster)}, fingerprint {next(iter(nodes_of))}"


@_check("GPUs", "check that torch can be imported there")
def check_gpus(cluster: NodeActors) -> str:
    """torch sees as many as Ray counts."""
    failed, idle = [], []
    models: Counter[str] = Counter()
    for name, (seen, reason) in _values(cluster.call(node_checks.visible_gpus, timeout_s=30)).items():
        counted = cluster.resources[name].gpus
        models.update(seen)
        if len(seen) < counted:
            failed.append(f"{name} has {counted} for Ray, and torch sees {len(seen)}" + f" ({reason})" * (not seen))
        elif len(seen) > counted:
            idle.append(f"{name} has {len(seen)}, and Ray counts {counted}")
    if failed:
        raise _Problem(f"{'; '.join(failed)}: see nvidia-smi and the driver's version there, and --num-gpus of ray start")
    if idle:
        raise _Problem(f"{'; '.join(idle)}: start Ray there with --num-gpus, or these stay idle", "warning")
    return ", ".join(f"{n} x {model}" for model, n in models.items()) or "none: training is on CPUs"


@_check("DALI", "it needs the package of constraints.txt, and on GPUs a driver for CUDA 13 and free memory")
def check_decoding(cluster: NodeActors, image: bytes | None) -> str:
    """DALI makes a view of a patch on each node's CPU and GPUs. image: an encoded patch; None: one that is drawn here."""
    devices = _values(cluster.call(node_checks.decode, image or _drawn_patch(), timeout_s=40))
    kinds = dict.fromkeys(" and ".join(each) for each in devices.values())
    return f"decodes {'a patch of the set' if image else 'a drawn patch'} on {_node_count(cluster)} ({', '.join(kinds)})"


@_check("ports", "the address that Ray has of a node (--node-ip-address) must be one of its own")
def check_ports(cluster: NodeActors) -> str:
    """Every node can connect to a port that any other listens on: workers meet on ports that the system chooses."""
    addresses = cluster.addresses
    per_node: dict[str, tuple] = {name: (address,) for name, address in addresses.items()}
    ports = _values(cluster.call(node_checks.listen, timeout_s=10, per_node=per_node))
    endpoints = {name: (addresses[name], port) for name, port in ports.items()}
    per_node = {name: ({other: endpoints[other] for other in endpoints if other != name}, 3.0) for name in endpoints}
    results = cluster.call(node_checks.connection_errors, timeout_s=15, per_node=per_node)
    closed = [
        f"{name} cannot connect to {other} on port {ports[other]} ({reason})"
        for name, result in results.items()
        for other, reason in (result.value or {}).items()
    ]
    if wrong := [*_errors(results), *_shortened(closed)]:
        raise _Problem(f"{'; '.join(wrong)}: open all TCP ports between the nodes (firewall, security group)")
    pairs = len(addresses) * (len(addresses) - 1)
    return f"{pairs} connections between {_node_count(cluster)}" if pairs else "one node, which needs none"


def check_all_reduce(cluster: NodeActors, backend: Literal["gloo", "nccl"], names: Sequence[str]) -> Finding:
    """All-reduce over one process per node, as in training. Besides open ports, it needs the right network interface."""
    check, first = {"gloo": "gloo", "nccl": "NCCL"}[backend], names[0]
    address = cluster.addresses[first]
    port = cluster.call(node_checks.free_port, timeout_s=10, per_node={first: (address,)})[first]
    ranks = {name: (rank, len(names), address, port.value, backend, 10.0) for rank, name in enumerate(names)}
    sums = {first: port} if port.error else cluster.call(node_checks.all_reduce, timeout_s=25, per_node=ranks)
    expected = len(names) * (len(names) + 1) / 2
    wrong = _errors(sums) or [f"{n}: the sum is {s.value:g} and not {expected:g}" for n, s in sums.items() if s.value != expected]
    own_address = {name: (cluster.addresses[name],) for name in names}
    results = cluster.call(node_checks.network_interface, timeout_s=10, per_node=own_address)
    interfaces = {name: result.value for name, result in results.items() if not result.error}
    if not wrong:
        used = dict.fromkeys(str(interface) for interface, _ in interfaces.values())
        processes = f"{len(names)} process{'es' * (len(names) > 1)}"
        return Finding(check, "ok", f"a sum over {processes}, one per node ({', '.join(used)})")
    hints = [
        f"on {name} the host name resolves to {resolved}, and Ray has {cluster.addresses[name]}: correct /etc/hosts, or set"
        f" {check.upper()}_SOCKET_IFNAME={interface} before ray start"
        for name, (interface, resolved) in interfaces.items()
        if interface and resolved != cluster.addresses[name]
    ]
    if backend == "nccl":
        hints.append("set NCCL_DEBUG=INFO before ray start to see more; NCCL_SOCKET_IFNAME names the interface")
    hints = hints or ["set GLOO_SOCKET_IFNAME before ray start to the interface to use"]
    return Finding(check, "FAILED", "; ".join(_shortened(wrong)) + f": {'; '.join(hints)}")


@_check("clocks", "check that the node is alive (ray status)")
def check_clocks(cluster: NodeActors) -> str:
    """Each node's clock against this process's, in the middle of a round trip."""
    skews: dict[str, tuple[float, float]] = {}  # the round trip's half, which is the uncertainty; and the difference
    for name in cluster.resources:
        for _ in range(_ROUND_TRIPS):
            before, began = time.time(), time.monotonic()
            there = _values(cluster.call(time.time, timeout_s=5, per_node={name: ()}))[name]
            half = (time.monotonic() - began) / 2
            skews[name] = min(skews.get(name, (float("inf"), 0.0)), (half, there - (before + half)))
    wrong = [
        f"{name} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        for name, (half, skew) in skews.items()
        if abs(skew) > MAX_CLOCK_SKEW_S + half
    ]
    if wrong:
        hint = "start chronyd or systemd-timesyncd there (the lock of a run at a URL fails at 30 s)"
        raise _Problem(f"{'; '.join(_shortened(wrong))}: {hint}", "warning")
    return f"less than {max(abs(skew) + half for half, skew in skews.values()):.3f} s from this machine's"


@_check("free space", "check that its disks respond (df)")
def check_free_space(cluster: NodeActors, storage: str, *, cached: bool) -> str:
    """Enough for checkpoints and shards. cached: whether data or runs are at a URL, and so have a cache on each node."""
    places = [None] * cached + [storage] * (not is_url(storage))  # None: the cache
    least, full = [], []
    for place in reversed(places):
        kind = "storage" if place else "cache"
        spaces = _values(cluster.call(node_checks.disk_space, place, timeout_s=10))
        least.append(f"{kind} {_gib(min(space.free for space in spaces.values()))}")
        for name, space in spaces.items():
            if space.free < MIN_FREE_BYTES:
                full.append(f"{kind} {space.path} on {name} has {_gib(space.free)}")
    if full:
        hint = "make room, or use --cache-gib and PATCHCLR_CACHE for the cache and another --storage"
        raise _Problem(f"{'; '.join(_shortened(full))}: {hint}", "warning")
    return f"at least {', '.join(least)}" if least else "the storage is a URL, whose free space is not known"


@_check("/dev/shm", "check that its disks respond (df)")
def check_shared_memory(cluster: NodeActors) -> str:
    """Enough for NCCL and Ray's object store."""
    spaces = _values(cluster.call(node_checks.disk_space, "/dev/shm", timeout_s=10))
    small = [f"{n} has {_gib(s.total)}, {_gib(s.free)} free" for n, s in spaces.items() if s.free < MIN_SHARED_MEMORY_BYTES]
    if small:
        hint = "give a container more (docker run --shm-size=8g), or remove what is left in /dev/shm"
        raise _Problem(f"{'; '.join(_shortened(small))}: {hint}", "warning")
    return f"at least {_gib(min((space.free for space in spaces.values()), default=0))} free"


def _call_here(function: Callable, *args: Any) -> CallResult:
    """Call a function in this process as on a node: a folder that hangs must not block this process."""
    results: list[CallResult] = []

    def call() -> None:
        try:
            results.append(CallResult(function(*args)))
        except Exception as error:  # whatever it is, it is the finding
            results.append(CallResult(None, describe(error)))

    thread = threading.Thread(target=call, name=f"doctor: {function.__name__}", daemon=True)
    thread.start()
    thread.join(STORAGE_TIMEOUT_S)
    return results[0] if results else CallResult(None, f"no answer within {STORAGE_TIMEOUT_S:g} s")


def _values(results: Mapping[str, CallResult]) -> dict[str, Any]:
    """What each node returned. Raises _NodeError if a call failed."""
    if errors := _errors(results):
        raise _NodeError("; ".join(errors))
    return {name: result.value for name, result in results.items()}


def _errors(results: Mapping[str, CallResult]) -> list[str]:
    errors = _nodes_by_value({name: result.error for name, result in results.items() if result.error})
    return _shortened([f"{nodes}: {error}" for error, nodes in errors.items()])


def _nodes_by_value(values: Mapping[str, Any]) -> dict[Any, str]:
    """For each value, the names of the nodes that have it, as text."""
    names = defaultdict(list)
    for name, value in values.items():
        names[value].append(name)
    return {value: ", ".join(_shortened(each)) for value, each in names.items()}


def _shortened(texts: list[str]) -> list[str]:
    return texts if len(texts) <= 4 else [*texts[:3], f"{len(texts) - 3} more"]


def _node_count(cluster: NodeActors) -> str:
    return f"{len(cluster.resources)} node{'s' * (len(cluster.resources) > 1)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _drawn_patch() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()
