"""Are views on a GPU those of the CPU, and do they stay the same? A part of gpu_bench.py, and all of `make gpu-check`.

    python benchmarks/gpu_check.py --data SHARDS --out DIR                    # on a host with a GPU
    python benchmarks/gpu_check.py --data SHARDS --out DIR --sample 12 --dry  # the same code on a CPU

It compares pixels that are decoded, resized and augmented on the device with the CPU's, in levels of 255, and asks whether a view
stays the same, bit for bit, in another batch and after a restart.

Results: <out>/<date>-gpu-check.json and .md. A check that fails is recorded with its error and the next one begins; the exit code
is then 1.
"""

import io
import itertools
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Result, script, set_of
from PIL import Image, ImageOps
from report import Record, Report, Table

from pipelines.loader import ViewLoader
from pipelines.recipes import IMAGENET_MEAN, IMAGENET_STD, get_recipe
from pipelines.shard_reader import ShardReader
from sharding.cli import option, required
from sharding.packing import build_shards

SEED = 42
_BATCH = 32  # patches of a batch of views


@dataclass(frozen=True)
class Config:
    """What is checked, and how large."""

    data: str = required("the shard set whose patches are compared")
    out: str = required("folder for the results")
    image_size: int = option(224, "side of the views, pixels")
    sample: int = option(64, "patches whose pixels are compared")
    commit: str | None = option(None, "the code's commit, where the host has the files without their history")
    dry: bool = option(False, "the same code on the CPU")


@dataclass(frozen=True)
class Setup:
    """What the checks share. stored: the set; png: its sample as PNG, which is decoded on the CPU everywhere."""

    stored: ShardReader
    png: ShardReader
    device: str
    image_size: int
    sample: int


Measurements = Iterator[tuple[str, Record]]  # by name, as they are made


# ---- The checks. DALI is imported inside: where it is broken, the checks that do without it still have results ----


def decode(setup: Setup) -> Measurements:
    """As the loader decodes on the device against DALI on the CPU, and whether it depends on the batch."""
    from contenders.loader import our_decoder

    encoded = setup.stored.read(np.arange(setup.sample))
    on_cpu = decoded(encoded, len(encoded), our_decoder("cpu"))
    one, other = (decoded(encoded, size, our_decoder(setup.device)) for size in (len(encoded), max(1, len(encoded) * 3 // 8)))
    yield "decoding", difference(one, on_cpu)
    yield "decoding: other batch", difference(one, other)


def views(setup: Setup) -> Measurements:
    """Views on the device against those on the CPU from the same draws."""
    side = setup.image_size
    for name, reader, recipe, size in (
        ("resizing alone, down", setup.png, "eval-plain", side * 5 // 7),
        ("resizing alone, up", setup.png, "eval-plain", side * 9 // 7),
        ("resizing and colours", setup.png, "simclr", side),
        ("simclr as stored", setup.stored, "simclr", side),
    ):
        given: Record = {"recipe": recipe, "size": size, "batch_size": min(_BATCH, setup.sample), "threads": 2}
        on_device, on_cpu = (first_views(reader, setup.sample, device=device, **given) for device in (setup.device, "cpu"))
        yield name, difference(levels(on_device), levels(on_cpu))


def purity(setup: Setup) -> Measurements:
    """Whether views on the device are the same, bit for bit, in another batch, with other threads, and after a restart."""
    for name, reader, recipe in (("resized PNG", setup.png, "eval-plain"), ("simclr as stored", setup.stored, "simclr")):
        count = min(4 * _BATCH, len(reader))
        batch_size = min(_BATCH, count * 2 // 3)
        common: Record = {"recipe": recipe, "size": setup.image_size, "device": setup.device}
        usual = common | {"batch_size": batch_size, "threads": 4}
        first = first_views(reader, count, **usual)
        other = first_views(reader, count, batch_size=batch_size * 3 // 4, threads=1, **common)
        rest = first_views(reader, count - batch_size, step=1, **usual)
        yield f"{name}: again", identity(first, first_views(reader, count, **usual))
        yield f"{name}: other batch and threads", identity(first, other)
        yield f"{name}: restart", identity(first[:, batch_size:], rest)


# ---- Pixels ----


def decoded(encoded: list[np.ndarray], batch_size: int, decoder: Record) -> list[np.ndarray]:
    """Pixels of each image, (H, W, 3) uint8, by DALI alone."""
    from contenders.loader import decode_pipeline

    batches = [encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    # It works ahead, so it is given more batches than are taken.
    pipeline = decode_pipeline(itertools.cycle(batches), batch_size, threads=4, decoder=decoder)
    images: list[np.ndarray] = []
    for _ in batches:
        (tensors,) = pipeline.run()
        on_host = tensors.as_cpu() if decoder["device"] == "mixed" else tensors
        images += [np.array(on_host[i]) for i in range(len(on_host))]
    return images


def first_views(
    reader: ShardReader, count: int, *, recipe: str, size: int, device: str, batch_size: int, threads: int, step: int = 0
) -> torch.Tensor:
    """The first views of an epoch from that step on: (V, count, 3, S, S) on the CPU."""
    given: dict[str, Any] = {"batch_size": batch_size, "image_size": size, "device": device, "threads": threads}
    loader = ViewLoader(reader, np.arange(len(reader)), recipe=get_recipe(recipe), seed=SEED, drop_last=False, **given)
    loader.load_state_dict({"epoch": 0, "step": step})
    batches = itertools.islice(loader, -(-count // batch_size))
    return torch.cat([batch.views.cpu() for batch in batches], dim=1)[:, :count]


def levels(views_VBCSS: torch.Tensor) -> np.ndarray:
    """Normalised views as levels of 255, (V * B, 3, S, S)."""
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (views_VBCSS.flatten(0, 1).numpy() * std + mean) * 255


def difference(some: Iterable[np.ndarray], others: Iterable[np.ndarray]) -> Record:
    """Mean, 99.9th percentile and maximum of the absolute difference, and the share of values that differ by more than 1."""
    pairs = zip(some, others, strict=True)
    d = np.concatenate([np.abs(np.subtract(a, b, dtype=np.float32)).ravel() for a, b in pairs])
    found = {"mean": d.mean(), "p99_9": np.percentile(d, 99.9), "max": d.max(), "share_above_1": (d > 1).mean()}
    return {name: round(float(value), 6) for name, value in found.items()}


def identity(one_VBCSS: torch.Tensor, other_VBCSS: torch.Tensor) -> Record:
    """Whether two tensors of views are identical bit for bit, the share of views that differ, and by how much."""
    different_VB = (one_VBCSS != other_VBCSS).flatten(2).any(2)
    largest = float(np.abs(levels(one_VBCSS) - levels(other_VBCSS)).max())
    return {"identical": not bool(different_VB.any()), "views": float(different_VB.float().mean()), "max_levels": largest}


# ---- The command ----

CHECKS: tuple[Callable[[Setup], Measurements], ...] = (decode, views, purity)


def main(config: Config) -> None:
    if not config.dry and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here: --dry runs the same code on the CPU")
    if config.dry:
        torch.set_num_threads(1)  # on shared cores, threads that wait for each other are many times slower
    result = Result(config.out, "gpu-check", ["torch", "nvidia-dali-cuda130", "numba", "numpy"], commit=config.commit)
    result.record |= {"dry": config.dry, "image_size": config.image_size, "set": set_of(Path(config.data)), "found": {}}
    if not config.dry:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        result.record["found"]["GPU"] = {"name, driver, clock, power": said, "CUDA": torch.version.cuda}
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        stored = ShardReader(config.data)
        sample = min(config.sample, len(stored))
        png = as_png(stored, sample, Path(folder))
        run_checks(Setup(stored, png, "cpu" if config.dry else "cuda", config.image_size, sample), result)
    result.finish(report_of(result.record))


def as_png(reader: ShardReader, count: int, folder: Path) -> ShardReader:
    """The first patches of a set as a set of PNGs, made in that folder."""
    (folder / "png").mkdir()
    for i, encoded in enumerate(reader.read(np.arange(count))):
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            ImageOps.exif_transpose(image).convert("RGB").save(folder / "png" / f"{i:06d}.png")
    return ShardReader(build_shards([folder / "png"], folder / "shards", unlabelled=True, workers=1).out)


def run_checks(setup: Setup, result: Result) -> None:
    """Each measurement is written down at once: the process may be ended at any time."""
    for check in CHECKS:
        try:
            for name, value in check(setup):
                result.record["found"][name] = value
                result.say(f"{name}: {value}")
                result.save()
        # The one place that catches everything: a GPU is lent for minutes, and what the other checks find is worth having. The
        # error is kept, shown, and decides the exit code.
        except Exception as error:
            result.record["failed"][check.__name__] = f"{type(error).__name__}: {error}"
            traceback.print_exc()


def report_of(record: Record) -> Report:
    """A row for each measurement."""
    rows = [[name, ", ".join(f"{key} {value}" for key, value in found.items())] for name, found in record["found"].items()]
    failed = [f"- {name}: FAILED: {why}" for name, why in record["failed"].items()]
    title = "GPU check (a dry run: no figure means anything)" if record["dry"] else "GPU check"
    return Report(record, title, [Table(["measured", "found"], rows), *failed])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
