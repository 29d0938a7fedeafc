"""Contenders of the packing benchmark: each packs or decodes the same folder.

A contender imports what it needs, then notes the time, works, and returns how many patches its output holds and its seconds.
The benchmark adds the start of the process and the sync to the disk.
"""

import dataclasses
import functools
import io
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from drawn_images import LAYOUT, image_files
from worker import Contender, own_memory

BATCH = 128  # patches that DALI decodes at a time
SHARD_BYTES = 128 * 10**6  # of ShardWriter, as ours are by default
_START_S = 300  # seconds that decoding processes wait for each other


@dataclasses.dataclass(frozen=True)
class Task:
    """What is packed, and where to."""

    images: str
    out: str
    workers: int


def _report(patches: int, work_s: float) -> dict[str, Any]:
    """patches: that the output holds, or that were decoded; work_s: seconds, after all imports."""
    return {"patches": patches, "work_s": work_s, "process": os.getpid(), "peak_bytes": own_memory("VmHWM")}


# ---- The baseline: reading and decoding alone ----


def decode_dali(task: Task) -> dict[str, Any]:
    """One DALI pipeline on the CPU with a thread per core."""
    import numpy as np

    from contenders.loader import decode_pipeline, our_decoder

    files = [path for path, _ in image_files(task.images)]
    parts = (files[start : start + BATCH] for start in range(0, len(files), BATCH))
    batches = ([np.fromfile(path, np.uint8) for path in part] for part in parts)
    pipeline = decode_pipeline(batches, BATCH, threads=task.workers, decoder=our_decoder("cpu"))
    pipeline.build()
    started, done = time.monotonic(), 0
    try:
        while True:
            (images,) = pipeline.run()
            done += len(images)
    except StopIteration:
        return _report(done, time.monotonic() - started)


def decode_nvimgcodec(task: Task) -> dict[str, Any]:
    """nvImageCodec's decoders in a process per core. The clock starts when all of them are ready."""
    files = [path for path, _ in image_files(task.images)]
    shares = [files[start :: task.workers] for start in range(task.workers)]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(task.workers)
    with ProcessPoolExecutor(task.workers, mp_context=context, initializer=_set_barrier, initargs=(barrier,)) as pool:
        spans = list(pool.map(_decode_share, shares))
    return _report(sum(count for count, _, _ in spans), max(end for _, _, end in spans) - min(start for _, start, _ in spans))


_barrier: threading.Barrier | None = None  # of the decoding processes; it can only be handed to a process that starts


def _set_barrier(barrier) -> None:
    global _barrier
    _barrier = barrier


def _decode_share(files: Sequence[str]) -> tuple[int, float, float]:
    """Patches decoded, and when the first and the last one were, on the clock that all processes share."""
    os.environ["PYNVIMGCODEC_VERBOSITY"] = "0"
    import nvidia.nvimgcodec as codec

    backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
    decoder = codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)
    assert _barrier is not None
    _barrier.wait(_START_S)  # and so no process takes two shares
    started, done = time.monotonic(), 0
    for path in files:
        done += decoder.decode(_read(path)) is not None
    return done, started, time.monotonic()


# ---- Ours ----


def ours(task: Task, *, check: str) -> dict[str, Any]:
    from sharding.packing import build_shards

    started = time.monotonic()
    settings: dict[str, Any] = {"layout": LAYOUT, "workers": task.workers, "encode": "keep", "check": check}
    summary = build_shards([task.images], Path(task.out) / "shards", **settings)
    return _report(summary.packed, time.monotonic() - started)


# ---- The others, each as its guide shows it, with the files' own bytes ----


def webdataset(task: Task, *, check: bool) -> dict[str, Any]:
    from webdataset import ShardWriter

    if check:
        import PIL.JpegImagePlugin
        import PIL.PngImagePlugin  # noqa: F401  (not while the clock runs)

    started = time.monotonic()
    pattern = f"{task.out}/shard-%06d.tar"
    with ShardWriter(pattern, maxcount=10**9, maxsize=SHARD_BYTES, verbose=0, mtime=0) as writer:
        for number, (path, label) in enumerate(image_files(task.images)):
            data = _read(path)
            if check:
                _check_with_pillow(data)
            writer.write({"__key__": f"{number:09d}", _extension(path): data, "cls": label})
        count = writer.total
    return _report(count, time.monotonic() - started)


def _check_with_pillow(data: bytes) -> None:
    """Both of Pillow's checks: an image that was verified has to be opened again to be decoded."""
    import PIL.Image

    with PIL.Image.open(io.BytesIO(data)) as image:
        image.verify()
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.load()


def litdata(task: Task) -> dict[str, Any]:
    """`optimize` with a process per core. Chunks of 64 MB, as in its guide."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{task.out}/cache"  # by default one place for all on this machine
    import litdata

    started = time.monotonic()
    out = Path(task.out) / "chunks"
    litdata.optimize(
        fn=_litdata_sample,
        inputs=list(image_files(task.images)),
        output_dir=str(out),
        chunk_bytes="64MB",
        num_workers=task.workers,
        verbose=False,
    )
    seconds = time.monotonic() - started
    return _report(sum(chunk["chunk_size"] for chunk in _read_json(out / "index.json")["chunks"]), seconds)


def _litdata_sample(item: tuple[str, int]) -> dict[str, Any]:
    path, label = item
    return {"image": _read(path), "label": label}


def mosaicml(task: Task) -> dict[str, Any]:
    """`MDSWriter` in one process, with its own default size of a shard (64 MiB)."""
    from streaming import MDSWriter

    started = time.monotonic()
    out = Path(task.out) / "mds"
    with MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}) as writer:
        for path, label in image_files(task.images):
            writer.write({"image": _read(path), "label": label})
    seconds = time.monotonic() - started
    return _report(sum(shard["samples"] for shard in _read_json(out / "index.json")["shards"]), seconds)


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _extension(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _contender(title: str, run: Callable[..., dict[str, Any]], needs: str = "", package: str = "", **given: Any) -> Contender:
    return Contender(title, functools.partial(run, **given), (needs,) if needs else (), package)


# In the order of the rounds
CONTENDERS = {
    "decode-dali": _contender("bare decode, DALI with a thread per core", decode_dali, "nvidia.dali", "nvidia-dali-cuda130"),
    "decode-nvimgcodec": _contender(
        "bare decode, nvImageCodec in a process per core", decode_nvimgcodec, "nvidia.nvimgcodec", "nvidia-nvimgcodec-cu13"
    ),
    "ours-decode": _contender("ours, --check decode, a process per core", ours, check="decode"),
    "ours-header": _contender("ours, --check header, a process per core", ours, check="header"),
    "tar": Contender("GNU tar, one process", None),
    "webdataset": _contender("webdataset.ShardWriter, one process", webdataset, "webdataset", "webdataset", check=False),
    "webdataset-pillow": _contender(
        "the same after Pillow's verify and load", webdataset, "webdataset", "webdataset", check=True
    ),
    "litdata": _contender("litdata.optimize, a process per core", litdata, "litdata", "litdata"),
    "mosaicml": _contender("streaming.MDSWriter, one process", mosaicml, "streaming", "mosaicml-streaming"),
}
DECODERS = ("decode-dali", "decode-nvimgcodec")
