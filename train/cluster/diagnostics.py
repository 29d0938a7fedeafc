"""Whether a cluster is fit for a run, by what its nodes answer: a finding for each thing that may be wrong, with a way out.

All that waits has a limit, so a node or a store that hangs becomes a finding too.
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
from typing import Any, Literal, NamedTuple, Protocol

from pipelines.remote_folder import is_url
from sharding.cli import describe
from train.cluster.node_checks import (
    Answer,
    ShardsSeen,
    all_reduce,
    decode,
    free_port,
    gpus_seen,
    installed,
    interface_of,
    leave_mark,
    listen,
    look_at_shards,
    remove_marks,
    rooms,
    unreachable,
    unseen_marks,
)
from train.cluster.resources import Node, share_of
from train.config import worker_range

MOST_WAIT = 20.0  # seconds for a folder or a store
MOST_LATE = 5.0  # seconds until a node sees what another has written: what NFS may keep of a folder, by default
MOST_SKEW = 1.0  # seconds between two clocks. The lease of a run at a URL (train/records/run_lock.py) fails at 30
LEAST_FREE = 10 * 2**30  # bytes: some checkpoints of a large backbone, some shards
LEAST_SHARED_MEMORY = 2**30  # bytes: NCCL and Ray's object store; Docker gives 64 MiB where nobody asks for more

_INSTALL = "bring every node to one commit of this project and install it there (pip install -e . -c constraints.txt)"
_SHOWN = ("code", "python", "torch", "ray", "nvidia-dali-cuda130")  # of what must be equal, where all is
_ROUND_TRIPS = 3  # of a question for the time, the quickest of which counts


class Finding(NamedTuple):
    """One thing that was looked at. text: what was found, and unless all is well what to do."""

    what: str
    verdict: Literal["ok", "warning", "FAILED"]
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<8} {self.what:<13} {self.text}"


class Cluster(Protocol):
    """The nodes that are asked, as train.cluster.ray_cluster.Nodes has them."""

    shares: dict[str, Node]
    addresses: dict[str, str]

    def ask(
        self, function: Callable, *given: Any, seconds: float, each: Mapping[str, tuple] | None = None
    ) -> dict[str, Answer]: ...


def examine(
    cluster: Cluster,
    *,
    data: str | None,
    storage: str,
    workers: str | int,
    possible: Iterable[Node],
    packages: Sequence[str],
    commit: str,
) -> Iterator[Finding]:
    """All findings, each as soon as it is made.

    data: a shard set's absolute folder or URL; storage: likewise of runs; workers: as --workers has them, 0: not looked at;
    possible: all nodes that there can be; packages: whose versions must be equal; commit: of the code here, for the eye.
    """
    if worker_range(workers)[1]:
        yield check_workers(possible, workers)
    yield check_versions(cluster, packages, commit=commit)
    yield check_storage(cluster, storage)
    image = None
    if data is not None:
        finding, image = check_shards(cluster, data)
        yield finding
    yield check_gpus(cluster)
    yield check_decoding(cluster, image)
    yield check_ports(cluster)
    yield check_all_reduce(cluster, "gloo", list(cluster.shares))
    if with_gpus := [name for name, node in cluster.shares.items() if node.gpus]:
        yield check_all_reduce(cluster, "nccl", with_gpus)
    yield check_clocks(cluster)
    yield from check_rooms(cluster, storage, cached=is_url(data) or is_url(storage))


def preflight(cluster: Cluster, *, sets: Iterable[tuple[str, str]], storage: str | None, packages: Sequence[str]) -> None:
    """What would otherwise be found out by a run that has begun: versions, storage, shards. Says nothing where all is well.

    sets: folder or URL, and fingerprint, of each shard set; storage: the run's own folder or URL; None: nothing
    is written by workers.
    Raises ValueError with the first finding that fails.
    """
    checks: list[Callable[[], Finding]] = [
        functools.partial(check_versions, cluster, packages),
        *([functools.partial(check_storage, cluster, storage)] if storage is not None else []),
        *(functools.partial(_same_shards, cluster, *each) for each in sets),
    ]
    for check in checks:
        finding = check()
        if finding.verdict == "FAILED":
            raise ValueError(f"{finding.what}: {finding.text}. Nothing was started; python train/doctor.py looks at all the rest")


def check_workers(possible: Iterable[Node], workers: str | int) -> Finding:
    """So many workers can be had."""
    try:
        share = share_of(possible, *worker_range(workers), None, said=str(workers))
    except ValueError as error:
        return Finding("workers", "FAILED", f"{error}: ask for fewer, or add nodes")
    return Finding("workers", "ok", f"{workers}, each with {share.cpus} CPUs{f' and {share.gpus:g} GPU' if share.gpus else ''}")


def check_versions(cluster: Cluster, packages: Sequence[str], *, commit: str = "") -> Finding:
    """The same Python, packages and code everywhere; the driver's own are those that count."""
    answers = {"this process": Answer(installed(packages)), **cluster.ask(installed, tuple(packages), seconds=20)}
    if wrong := _errors(answers):
        return Finding("versions", "FAILED", f"{wrong}: {_INSTALL}")
    differing = []
    for thing in answers["this process"].result:
        if len(found := _by_value({name: answer.result[thing] for name, answer in answers.items()})) > 1:
            differing.append(f"{thing} {' and '.join(f'{value} ({names})' for value, names in found.items())}")
    if differing:
        return Finding("versions", "FAILED", f"not the same everywhere: {'; '.join(differing)}: {_INSTALL}")
    own = answers["this process"].result
    same = ", ".join(f"{thing} {own[thing]}" for thing in _SHOWN if thing in own) + f"; {len(packages)} packages are equal"
    return Finding("versions", "ok", f"{same}{f' (commit {commit[:12]})' if commit else ''}")


def check_storage(cluster: Cluster, storage: str) -> Finding:
    """Every node can write there, and all see what each wrote."""
    folder = f".doctor-{secrets.token_hex(4)}"
    marks = {name: f"node-{i}" for i, name in enumerate(cluster.shares)}
    existed = is_url(storage) or Path(storage).exists()
    written = {"this process": _here(leave_mark, storage, folder, True, "driver")}
    try:
        if not written["this process"].error:
            written |= cluster.ask(
                leave_mark, storage, folder, False, seconds=30, each={name: (mark,) for name, mark in marks.items()}
            )
        if wrong := _errors(written):
            return Finding(
                "storage",
                "FAILED",
                f"{wrong}: give --storage a folder that all nodes have at this path and may write to (NFS), or a URL"
                " (s3://bucket/runs)",
            )
        wanted = ("driver", *marks.values())
        seen = {"this process": _here(unseen_marks, storage, folder, wanted, MOST_LATE)}
        seen |= cluster.ask(unseen_marks, storage, folder, wanted, MOST_LATE, seconds=MOST_WAIT)
        wrong = _errors(seen)
        names = {"driver": "this process"} | {mark: name for name, mark in marks.items()}
        blind = [
            f"{name} does not see what {', '.join(names[mark] for mark in answer.result)} wrote"
            for name, answer in seen.items()
            if answer.result
        ]
        if wrong or blind:
            told = "; ".join([*([wrong] if wrong else []), *blind])
            return Finding("storage", "FAILED", f"{storage} is not one storage for all nodes: {told}: mount it from one server")
    finally:
        _here(remove_marks, storage, folder)
        if not existed:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                Path(storage).rmdir()
    return Finding("storage", "ok", f"{storage} is written to and read by {_nodes(cluster)}")


def check_shards(cluster: Cluster, shards: str, known: str | None = None) -> tuple[Finding, bytes | None]:
    """The set can be read on every node and is the same one; and an image of it. known: the fingerprint that it should have."""
    here = _here(look_at_shards, shards)
    answers = {"this process": here, **cluster.ask(look_at_shards, shards, seconds=MOST_WAIT)}
    if wrong := _errors(answers):
        text = f"{wrong}: give --data a folder that all nodes have at this path, or a URL (s3://bucket/kidney)"
        return Finding("shards", "FAILED", text), here.result.image if here.result else None
    seen: dict[str, ShardsSeen] = {name: answer.result for name, answer in answers.items()}
    prints = _by_value({name: each.fingerprint[:12] for name, each in seen.items()} | ({"the run": known[:12]} if known else {}))
    if len(prints) > 1:
        told = " and ".join(f"{value} ({names})" for value, names in prints.items())
        text = f"{shards} is not the same set everywhere, by its fingerprint: {told}: copy it anew from one place"
        return Finding("shards", "FAILED", text), seen["this process"].image
    return Finding("shards", "ok", f"{shards} is read by {_nodes(cluster)}, fingerprint {next(iter(prints))}"), here.result.image


def _same_shards(cluster: Cluster, shards: str, known: str) -> Finding:
    return check_shards(cluster, shards, known)[0]


def check_gpus(cluster: Cluster) -> Finding:
    """As many as Ray counts, torch sees."""
    answers = cluster.ask(gpus_seen, seconds=30)
    if wrong := _errors(answers):
        return Finding("GPUs", "FAILED", f"{wrong}: see whether torch can be imported there")
    failed, idle = [], []
    kinds: Counter[str] = Counter()
    for name, answer in answers.items():
        counted, seen = cluster.shares[name].gpus, answer.result.names
        kinds.update(seen)
        if len(seen) < counted:
            failed.append(f"{name} has {counted} for Ray, and torch sees {len(seen)}" + f" ({answer.result.reason})" * (not seen))
        elif len(seen) > counted:
            idle.append(f"{name} has {len(seen)}, and Ray counts {counted}")
    if failed:
        return Finding(
            "GPUs", "FAILED", f"{'; '.join(failed)}: see nvidia-smi and the driver's version there, and --num-gpus of ray start"
        )
    if idle:
        return Finding("GPUs", "warning", f"{'; '.join(idle)}: start Ray there with --num-gpus, or these stay idle")
    return Finding("GPUs", "ok", ", ".join(f"{n} x {kind}" for kind, n in kinds.items()) or "none: training is on CPUs")


def check_decoding(cluster: Cluster, image: bytes | None) -> Finding:
    """DALI makes a view of a patch on every node, on its CPU and its GPUs. image: encoded; without one, it is drawn."""
    answers = cluster.ask(decode, image or _drawn_patch(), seconds=40)
    if wrong := _errors(answers):
        return Finding(
            "DALI",
            "FAILED",
            f"{wrong}: it needs the package of constraints.txt, and on GPUs a driver for CUDA 13 and free memory",
        )
    places = ", ".join(f"{' and '.join(on.split())}" for on in _by_value({n: " ".join(a.result) for n, a in answers.items()}))
    what = "a patch of the set" if image else "a drawn patch"
    return Finding("DALI", "ok", f"decodes {what} on {_nodes(cluster)} ({places})")


def check_ports(cluster: Cluster) -> Finding:
    """Every node can connect to a port that any other listens on: workers meet on ports that the system chooses."""
    addresses = cluster.addresses
    opened = cluster.ask(listen, seconds=10, each={name: (address,) for name, address in addresses.items()})
    if wrong := _errors(opened):
        return Finding(
            "ports", "FAILED", f"{wrong}: the address that Ray has of a node (--node-ip-address) must be one of its own"
        )
    places = {name: (addresses[name], answer.result) for name, answer in opened.items()}
    others = {name: ({other: place for other, place in places.items() if other != name}, 3.0) for name in places}
    answers = cluster.ask(unreachable, seconds=15, each=others)
    wrong = _errors(answers)
    shut = [
        f"{name} cannot connect to {other} on port {places[other][1]} ({why})"
        for name, answer in answers.items()
        for other, why in (answer.result or {}).items()
    ]
    if wrong or shut:
        told = "; ".join([*([wrong] if wrong else []), *_few(shut)])
        return Finding("ports", "FAILED", f"{told}: open all TCP ports between the nodes (firewall, security group)")
    pairs = len(addresses) * (len(addresses) - 1)
    return Finding("ports", "ok", f"{pairs} connections between {_nodes(cluster)}" if pairs else "one node, which needs none")


def check_all_reduce(cluster: Cluster, backend: str, names: Sequence[str]) -> Finding:
    """A sum over one process per node, as training forms it. Beside free ports, it needs the right interface."""
    what, first = {"gloo": "gloo", "nccl": "NCCL"}[backend], names[0]
    address = cluster.addresses[first]
    port = cluster.ask(free_port, seconds=10, each={first: (address,)})[first]
    ranks = {name: (rank, len(names), address, port.result, backend, 10.0) for rank, name in enumerate(names)}
    answers = cluster.ask(all_reduce, seconds=25, each=ranks) if not port.error else {first: port}
    expected = len(names) * (len(names) + 1) / 2
    wrong = _errors(answers) or _errors(
        {name: Answer(None, f"the sum is {answer.result:g} and not {expected:g}") for name, answer in answers.items()}
        if any(answer.result != expected for answer in answers.values())
        else {}
    )
    places = cluster.ask(interface_of, seconds=10, each={name: (cluster.addresses[name],) for name in names})
    if wrong:
        return Finding(what, "FAILED", f"{wrong}: {'; '.join(_interface_hints(cluster, places, what))}")
    used = _by_value({name: str(answer.result[0]) for name, answer in places.items() if not answer.error})
    return Finding(what, "ok", f"a sum over {len(names)} process{'es' * (len(names) > 1)}, one per node ({', '.join(used)})")


def _interface_hints(cluster: Cluster, places: dict[str, Answer], what: str) -> list[str]:
    hints = []
    for name, answer in places.items():
        if answer.error:
            continue
        interface, stands_for = answer.result
        if interface and stands_for != cluster.addresses[name]:
            hints.append(
                f"on {name} the host's name stands for {stands_for}, and Ray has {cluster.addresses[name]}: mend /etc/hosts, or"
                f" set {what.upper()}_SOCKET_IFNAME={interface} before ray start"
            )
    if what == "NCCL":
        return [*hints, "NCCL_DEBUG=INFO before ray start tells more; NCCL_SOCKET_IFNAME names the interface"]
    return hints or ["GLOO_SOCKET_IFNAME before ray start names the interface to use"]


def check_clocks(cluster: Cluster) -> Finding:
    """Against this process's: the time in the middle of a round trip."""
    apart, unsure = {}, {}
    for name in cluster.shares:
        unsure[name] = float("inf")
        for _ in range(_ROUND_TRIPS):
            before, began = time.time(), time.monotonic()
            answer = cluster.ask(time.time, seconds=5, each={name: ()})[name]
            half = (time.monotonic() - began) / 2
            if answer.error:
                return Finding("clocks", "FAILED", f"{name}: {answer.error}: see whether the node is alive (ray status)")
            if half < unsure[name]:
                unsure[name], apart[name] = half, answer.result - (before + half)
    # What the round trip leaves open is not held against a clock.
    off = {name: seconds for name, seconds in apart.items() if abs(seconds) > MOST_SKEW + unsure[name]}
    if off:
        told = [f"{name} is {abs(s):.1f} s {'ahead' if s > 0 else 'behind'}" for name, s in off.items()]
        text = f"{'; '.join(_few(told))}: start chronyd or systemd-timesyncd there (the lease of a run at a URL fails at 30 s)"
        return Finding("clocks", "warning", text)
    most = max(abs(apart[name]) + unsure[name] for name in apart)
    return Finding("clocks", "ok", f"less than {most:.3f} s from this machine's")


def check_rooms(cluster: Cluster, storage: str, *, cached: bool) -> Iterator[Finding]:
    """Free space, and the size of shared memory. cached: whether anything is at a URL, for which there is a cache."""
    answers = cluster.ask(rooms, storage, seconds=10)
    if wrong := _errors(answers):
        yield Finding("free space", "FAILED", f"{wrong}: see whether its disks answer (df)")
        return
    kinds = [kind for kind in ("storage", "cache") if (kind == "cache" and cached) or (kind == "storage" and not is_url(storage))]
    told, short = [], []
    for kind in kinds:
        least = min((answer.result[kind] for answer in answers.values()), key=lambda room: room.free)
        told.append(f"{kind} {_gib(least.free)}")
        for name, answer in answers.items():
            if (room := answer.result[kind]).free < LEAST_FREE:
                short.append(f"{kind} {room.path} on {name} has {_gib(room.free)}")
    hint = "make room, or use --cache-gib and PATCHCLR_CACHE for the cache and another --storage"
    if short:
        yield Finding("free space", "warning", f"{'; '.join(_few(short))}: {hint}")
    else:
        yield Finding("free space", "ok", f"at least {', '.join(told)}" if told else "the storage is a URL, which does not say")
    shared = {name: answer.result["shared memory"] for name, answer in answers.items()}
    if little := [f"{n} has {_gib(r.total)}, {_gib(r.free)} free" for n, r in shared.items() if r.free < LEAST_SHARED_MEMORY]:
        text = f"{'; '.join(_few(little))}: give a container more (docker run --shm-size=8g), or remove what is left in /dev/shm"
        yield Finding("/dev/shm", "warning", text)
    else:
        yield Finding("/dev/shm", "ok", f"at least {_gib(min((room.free for room in shared.values()), default=0))} free")


def _here(function: Callable, *given: Any) -> Answer:
    """As a node is asked: a folder that hangs must not take this process with it."""
    answers: list[Answer] = []

    def call() -> None:
        try:
            answers.append(Answer(function(*given)))
        except Exception as error:  # whatever it is, it is the finding
            answers.append(Answer(None, describe(error)))

    thread = threading.Thread(target=call, name=f"checkup: {function.__name__}", daemon=True)
    thread.start()
    thread.join(MOST_WAIT)
    return answers[0] if answers else Answer(None, f"no answer within {MOST_WAIT:g} s")


def _errors(answers: Mapping[str, Answer]) -> str:
    """What went wrong where, in one line; empty where nothing did."""
    return "; ".join(
        _few([f"{names}: {why}" for why, names in _by_value({n: a.error for n, a in answers.items() if a.error}).items()])
    )


def _by_value(found: Mapping[str, Any]) -> dict[Any, str]:
    """Which nodes have a value, for each value, in words."""
    names = defaultdict(list)
    for name, value in found.items():
        names[value].append(name)
    return {value: ", ".join(_few(each)) for value, each in names.items()}


def _few(texts: list[str]) -> list[str]:
    return texts if len(texts) <= 4 else [*texts[:3], f"{len(texts) - 3} more"]


def _nodes(cluster: Cluster) -> str:
    return f"{len(cluster.shares)} node{'s' * (len(cluster.shares) > 1)}"


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"


def _drawn_patch() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()
