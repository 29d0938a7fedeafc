"""What one node of a cluster finds out about itself for a checkup.

Called in a process there that has just started, so nothing that takes seconds to import is imported before it is needed.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import os
import platform
import shutil
import socket
import struct
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.remote_folder import RemoteFolder, is_url
from pipelines.shard_cache import default_cache
from sharding.cli import describe
from sharding.manifest import fingerprint, read_dataset

_OURS = ("sharding", "pipelines", "models", "train", "tune")
_MARK_BYTES = 2**20  # of a test file: a full disk may still take a few
_HEADER_BYTES = 2**13  # of a tar: its first member's, with what pax may put before it
_MOST = 2**30  # bytes of a dataset.json, as in pipelines/shard_cache.py
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


class Answer(NamedTuple):
    """What a node answered, or why it did not, in one sentence."""

    result: Any
    error: str | None = None


class ShardsSeen(NamedTuple):
    """The set's fingerprint, and the first image of one of its shards as it is stored."""

    fingerprint: str
    image: bytes


class GpusSeen(NamedTuple):
    """The GPUs that torch sees, by name, and why it sees none where it says."""

    names: list[str]
    reason: str | None


class Room(NamedTuple):
    """A place on a disk, and what is free of how much there, in bytes."""

    path: str
    free: int
    total: int


class Caller:
    """A node's process: calls what it is given, several at a time, so that one that hangs leaves the others their turn."""

    def call(self, function: Callable, *given: Any) -> Any:
        return function(*given)


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of Python and these packages, and a digest of our own code: a copy of it may have no git to name a commit."""
    found = {"python": platform.python_version()}
    for package in [each for each in packages if each not in found]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for folder in _OURS for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found | {"code": digest.hexdigest()[:12]}


def leave_mark(storage: str, folder: str, make: bool, name: str) -> None:
    """Write a file into a folder of the storage, which with `make` is made first. Raises ValueError where it is not there."""
    if is_url(storage):
        _store(f"{storage}/{folder}").write(name, name.encode())
        return
    place = Path(storage, folder)
    if make:
        place.mkdir(parents=True)
    elif not place.is_dir():  # made here too, it would hide that it is not the same
        raise ValueError(f"{storage} is not the driver's folder of that name")
    with open(place / name, "wb") as file:
        file.write(b"\0" * _MARK_BYTES)
        file.flush()
        os.fsync(file.fileno())


def unseen_marks(storage: str, folder: str, names: Sequence[str], seconds: float) -> list[str]:
    """Which of these files are not there, whole, after so many seconds: NFS may show what others wrote a little later."""
    until = time.monotonic() + seconds
    while True:
        if is_url(storage):
            found = set(_store(f"{storage}/{folder}").names())
        else:
            place = Path(storage, folder)
            found = {name for name in names if (place / name).exists() and (place / name).stat().st_size == _MARK_BYTES}
        unseen = [name for name in names if name not in found]
        if not unseen or time.monotonic() > until:
            return unseen
        time.sleep(0.1)


def remove_marks(storage: str, folder: str) -> None:
    """Remove the folder and what is in it."""
    if is_url(storage):
        store = _store(f"{storage}/{folder}")
        for name in store.names():
            store.remove(name)
    else:
        shutil.rmtree(Path(storage, folder), ignore_errors=True)


def look_at_shards(shards: str) -> ShardsSeen:
    """Read the set's description and an image of it; of a set at a URL no more is fetched than that, and nothing is kept.

    Raises ValueError where that cannot be, or a file of a set in a folder is missing.
    """
    if is_url(shards):
        store = _store(shards)
        with tempfile.TemporaryDirectory() as copy:
            Path(copy, "dataset.json").write_bytes(store.read("dataset.json", 0, _MOST))
            found, files = fingerprint(copy), read_dataset(copy)["files"]
    else:
        found, files = fingerprint(shards), read_dataset(shards)["files"]
        if missing := [name for name in files if not Path(shards, name).exists()]:
            raise ValueError(f"{shards} lacks {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}")
    tar = min(name for name in files if name.endswith(".tar"))

    def read(start: int, stop: int) -> bytes:
        if is_url(shards):
            return store.read(tar, start, stop)
        with open(Path(shards, tar), "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    try:
        with tarfile.open(fileobj=io.BytesIO(read(0, _HEADER_BYTES)), mode="r:") as begun:
            first = begun.next()
    except tarfile.TarError as error:
        raise ValueError(f"{shards}/{tar} cannot be read ({error}): copy the set again") from error
    assert first is not None
    image = read(first.offset_data, first.offset_data + first.size)
    if len(image) < first.size:
        raise ValueError(f"{shards}/{tar} was cut short: copy the set again")
    return ShardsSeen(found, image)


def gpus_seen() -> GpusSeen:
    """What torch sees of this node's GPUs."""
    _unhide_gpus()
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if names:
        return GpusSeen(names, None)
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return GpusSeen([], describe(error))
    return GpusSeen([], None)


def decode(image: bytes) -> list[str]:
    """Make a view of an encoded image by DALI, on the CPU and on each GPU. Returns on what. Raises RuntimeError as DALI does."""
    _unhide_gpus()
    import numpy as np
    import torch
    from PIL import Image

    from pipelines.dali_graph import DaliGraph
    from pipelines.recipes import get_recipe
    from pipelines.views import draw_views

    recipe = get_recipe("eval")
    try:
        with Image.open(io.BytesIO(image)) as opened:
            sizes = np.array([[opened.height, opened.width]])
    except OSError as error:  # its text has the address of the buffer
        raise ValueError("the patch is no image that Pillow can read") from error
    drawn = draw_views(np.zeros(1, np.int64), seed=0, epoch=0, recipe=recipe, sizes=sizes)
    done = []
    for place in ["CPU", *range(torch.cuda.device_count())]:
        on_gpu = isinstance(place, int)
        with torch.cuda.device(place) if on_gpu else contextlib.nullcontext():
            graph = DaliGraph(
                recipe=recipe, batch_size=1, image_size=64, device="cuda" if on_gpu else "cpu", threads=1, step="torch"
            )
            try:
                graph.put([np.frombuffer(image, np.uint8)], drawn)
                views = graph.get()
                if not (torch.isfinite(views).all() and views.shape == (1, 1, 3, 64, 64)):
                    raise RuntimeError(f"DALI made no picture of it on {place}")
            finally:
                graph.close()
        done.append(f"GPU {place}" if on_gpu else "CPU")
    return done


def listen(address: str) -> int:
    """Accept connections at this address from now on, and return the port."""
    server = socket.create_server((address, 0), backlog=128)

    def accept() -> None:
        while True:
            server.accept()[0].close()

    threading.Thread(target=accept, name="checkup of ports", daemon=True).start()
    return server.getsockname()[1]


def unreachable(others: Mapping[str, tuple[str, int]], seconds: float) -> dict[str, str]:
    """Of these addresses and ports, by name, those that do not let themselves be connected to within so many seconds; why."""
    found: dict[str, str] = {}

    def connect(name: str, place: tuple[str, int]) -> None:
        try:
            socket.create_connection(place, timeout=seconds).close()
        except OSError as error:
            found[name] = error.strerror or str(error)

    threads = [threading.Thread(target=connect, args=each) for each in others.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def all_reduce(rank: int, size: int, address: str, port: int, backend: str, seconds: float) -> float:
    """The sum of rank + 1 over all ranks, as training would form it: gloo on the CPU, NCCL on the first GPU.

    Raises RuntimeError as torch.distributed does.
    """
    _unhide_gpus()
    import datetime

    import torch
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=seconds)
    try:
        dist.init_process_group(backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=size, timeout=timeout)
        number = torch.full((1,), rank + 1.0, device="cuda:0" if backend == "nccl" else "cpu")
        dist.all_reduce(number)
        return float(number)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def interface_of(address: str) -> tuple[str | None, str]:
    """The interface that has this address, None where there is none; and the address that this node's name stands for."""
    found = None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(packed[20:24]) == address:
                    found = name
    try:
        return found, socket.gethostbyname(socket.gethostname())
    except OSError as error:
        return found, f"nothing ({error.strerror})"


def rooms(storage: str) -> dict[str, Room]:
    """What is free: in the cache, in shared memory, and where the storage is a folder, in it."""
    places = {"cache": default_cache(), "shared memory": Path("/dev/shm")}
    if not is_url(storage):
        places["storage"] = Path(storage)
    found = {}
    for name, path in places.items():
        there = next(each for each in [path, *path.parents] if each.exists())
        usage = shutil.disk_usage(there)
        found[name] = Room(str(path), usage.free, usage.total)
    return found


def _store(url: str) -> RemoteFolder:
    # A checkup waits for nobody: a store that fails now and then is told of, not waited for.
    return RemoteFolder(url, tries=2, timeout=10.0)


def _unhide_gpus() -> None:
    """Ray hides them from what asks for none, and a checkup must not wait for GPUs that a run has. Before torch looks."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        del os.environ["CUDA_VISIBLE_DEVICES"]
