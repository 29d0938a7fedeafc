"""The checks of a cluster that run on each of its nodes.

The process there has just started, so modules that take seconds to import are imported where they are needed.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import socket
import struct
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.remote_folder import MAX_JSON_BYTES, RemoteFolder, is_url
from pipelines.shard_cache import default_cache
from sharding.cli import describe
from sharding.manifest import claimed_fingerprint, fingerprint, read_dataset, shard_file
from train.records.runs import versions

_CODE_FOLDERS = ("sharding", "pipelines", "models", "train", "tune")
_TEST_FILE_BYTES = 2**20  # a full disk may still take fewer
_HEADER_BYTES = 2**13  # of a tar's first member, with pax headers before it
_MOST_IMAGE_BYTES = 2**30
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


class CallResult(NamedTuple):
    """What a call on a node returned, or in one sentence why it failed."""

    value: Any
    error: str | None = None


class ShardsSample(NamedTuple):
    """A set's fingerprint, and the first image of one of its shards, encoded as it is stored."""

    fingerprint: str
    image: bytes


class DiskSpace(NamedTuple):
    """Of the file system of a path, in bytes."""

    path: str
    free: int
    total: int


class NodeActor:
    """A process on a node that calls functions, several at a time, so that one that hangs does not block the others."""

    def call(self, function: Callable, *args: Any) -> Any:
        return function(*args)


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and these packages, and a digest of this project's code, which may be a copy without git."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for folder in _CODE_FOLDERS for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return versions(each for each in packages if each != "python") | {"code": digest.hexdigest()[:12]}


def write_test_file(storage: str, folder: str, make: bool, name: str) -> None:
    """Write a file into a folder of the storage. make: make the folder first. Raises ValueError if it does not exist."""
    if is_url(storage):
        _store(f"{storage}/{folder}").write(name, name.encode())
        return
    place = Path(storage, folder)
    if make:
        place.mkdir(parents=True)
    elif not place.is_dir():  # making it would hide that this is another storage
        raise ValueError(f"{storage} is not the driver's folder of that name")
    with open(place / name, "wb") as file:
        file.write(b"\0" * _TEST_FILE_BYTES)
        file.flush()
        os.fsync(file.fileno())


def missing_test_files(storage: str, folder: str, names: Sequence[str], timeout_s: float) -> list[str]:
    """Which of these files are not wholly there after the time-out: NFS may show what others wrote a little later."""
    ends = time.monotonic() + timeout_s
    while True:
        if is_url(storage):
            found = set(_store(f"{storage}/{folder}").names())
        else:
            place = Path(storage, folder)
            found = {name for name in names if (place / name).exists() and (place / name).stat().st_size == _TEST_FILE_BYTES}
        missing = [name for name in names if name not in found]
        if not missing or time.monotonic() > ends:
            return missing
        time.sleep(0.1)


def remove_test_files(storage: str, folder: str) -> None:
    """Remove the folder and what is in it."""
    if is_url(storage):
        store = _store(f"{storage}/{folder}")
        for name in store.names():
            store.remove(name)
    else:
        shutil.rmtree(Path(storage, folder), ignore_errors=True)


def sample_shards(shards: str) -> ShardsSample:
    """Read the set's description and one image. At a URL, nothing else is downloaded, and nothing is kept.

    Raises ValueError if that fails, or if a file of a set in a folder is missing.
    """
    if is_url(shards):
        store = _store(shards)
        with tempfile.TemporaryDirectory() as copy:
            Path(copy, "dataset.json").write_bytes(store.read("dataset.json", 0, MAX_JSON_BYTES))
            dataset = read_dataset(copy)
            found, files = claimed_fingerprint(dataset), dataset["files"]
    else:
        found, files = fingerprint(shards), read_dataset(shards)["files"]
        if missing := [name for name in files if not Path(shards, name).exists()]:
            raise ValueError(f"{shards} lacks {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}")
    tar = shard_file(0)
    if tar not in files:
        raise ValueError(f"{shards} has no patches: pack it again")

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
        raise ValueError(f"{shards}/{tar} cannot be read ({describe(error)}): copy the set again") from error
    if first is None or first.size > _MOST_IMAGE_BYTES:
        raise ValueError(f"{shards}/{tar} does not begin with an image: copy the set again")
    image = read(first.offset_data, first.offset_data + first.size)
    if len(image) < first.size:
        raise ValueError(f"{shards}/{tar} was cut short: copy the set again")
    return ShardsSample(found, image)


def visible_gpus() -> tuple[list[str], str | None]:
    """The names of the GPUs that torch sees on this node; if it sees none, also why, if torch says."""
    _unhide_gpus()
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return names, describe(error)
    return names, None


def decode(image: bytes) -> list[str]:
    """Make a view of an encoded image with DALI on the CPU and on each GPU. Returns these devices. Raises DALI's RuntimeError."""
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
    except OSError as error:  # its message has the address of the buffer
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
                    raise RuntimeError(f"DALI made no image of it on {place}")
            finally:
                graph.close()
        done.append(f"GPU {place}" if on_gpu else "CPU")
    return done


def listen(address: str) -> int:
    """Accept connections at this address from now on. Returns the port."""
    server = socket.create_server((address, 0), backlog=128)

    def accept() -> None:
        while True:
            server.accept()[0].close()

    threading.Thread(target=accept, name="doctor: listen", daemon=True).start()
    return server.getsockname()[1]


def connection_errors(endpoints: Mapping[str, tuple[str, int]], timeout_s: float) -> dict[str, str]:
    """Why connections to these addresses and ports fail, by name; without those that succeed within the time-out."""

    def connect(endpoint: tuple[str, int]) -> str | None:
        try:
            socket.create_connection(endpoint, timeout=timeout_s).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    with ThreadPoolExecutor(len(endpoints) or 1) as threads:
        errors = zip(endpoints, threads.map(connect, endpoints.values()), strict=True)
        return {name: error for name, error in errors if error}


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def all_reduce(rank: int, size: int, address: str, port: int, backend: str, timeout_s: float) -> float:
    """All-reduce rank + 1 over all ranks, as in training: gloo on the CPU, NCCL on the first GPU. Returns the sum.

    Raises RuntimeError as torch.distributed does.
    """
    _unhide_gpus()
    import datetime

    import torch
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=size, timeout=timeout)
        number = torch.full((1,), rank + 1.0, device="cuda:0" if backend == "nccl" else "cpu")
        dist.all_reduce(number)
        return float(number)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def network_interface(address: str) -> tuple[str | None, str]:
    """The network interface with this address, or None; and the address that this node's host name resolves to."""
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


def disk_space(folder: str | None) -> DiskSpace:
    """Of a folder that exists or can be made; None: the cache of shards and runs."""
    path = Path(folder) if folder else default_cache()
    usage = shutil.disk_usage(next(each for each in [path, *path.parents] if each.exists()))
    return DiskSpace(str(path), usage.free, usage.total)


def _store(url: str) -> RemoteFolder:
    # Few retries: a store that fails now and then is a finding.
    return RemoteFolder(url, tries=2, timeout=10.0)


def _unhide_gpus() -> None:
    """Ray hides GPUs from actors that reserve none, and a check must not wait for those of a run. Call it before torch looks."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        del os.environ["CUDA_VISIBLE_DEVICES"]
