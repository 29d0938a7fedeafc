"""The steps of the GPU check. Each puts plain data into `found` as it goes, so that what it found before it failed is kept."""

import dataclasses
import functools
import io
import itertools
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from report import Record

from pipelines.loader import ViewLoader
from pipelines.recipes import IMAGENET_MEAN, IMAGENET_STD, get_recipe
from pipelines.shard_reader import ShardReader
from pipelines.view_kernels_numba import parameter_rows, resized_view_step
from pipelines.view_kernels_torch import resized_view_batch
from pipelines.views import draw_views
from sharding.packing import build_shards
from sharding.process_pool import available_cores
from train.records.runs import versions

SEED = 42
_BATCH = 32  # patches of a batch of views

# DALI is imported inside the functions: where it is broken, the steps that do without it still have their results.


@dataclasses.dataclass
class Check:
    """What the steps share. folder: a temporary one; data: the shard set; sample: patches whose pixels are compared."""

    folder: Path
    data: str
    device: str
    image_size: int
    sample: int

    @functools.cached_property
    def stored(self) -> ShardReader:
        return ShardReader(self.data)

    @functools.cached_property
    def png(self) -> ShardReader:
        """The sample as PNG, which is decoded on the CPU everywhere."""
        (self.folder / "png").mkdir()
        for i, encoded in enumerate(self.encoded_sample()):
            by_pillow(encoded).save(self.folder / "png" / f"{i:06d}.png")
        return ShardReader(build_shards([self.folder / "png"], self.folder / "png_shards", unlabelled=True, workers=1).out)

    def encoded_sample(self) -> list[np.ndarray]:
        """The stored bytes of the patches whose pixels are compared."""
        return self.stored.read(np.arange(min(self.sample, len(self.stored))))


# ---- The steps ----


def environment(check: Check, found: Record) -> None:
    """What this was measured on."""
    found |= {"machine": platform.platform(), "cores": available_cores(), "versions": versions(), "cuda": torch.version.cuda}
    if check.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["driver, clock, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()


def decode(check: Check, found: Record) -> None:
    """Decoding on the device against DALI's own on the CPU, in levels of 255, and whether it depends on the batch.

    For JPEGs with colour in half the resolution (4:2:0) and in full (4:4:4), by DALI's defaults and as the loader decodes.
    """
    from pipelines.dali_graph import _GPU_DECODER

    stored = check.encoded_sample()
    kinds = {"as stored": stored, "4:2:0": [resampled(one, 2) for one in stored], "4:4:4": [resampled(one, 0) for one in stored]}
    decoders: Record = {"as the loader": {"device": "cpu"}}
    if check.device == "cuda":
        decoders = {"defaults": {"device": "mixed"}, "as the loader": _GPU_DECODER}
    for (kind, encoded), (name, decoder) in itertools.product(kinds.items(), decoders.items()):
        on_cpu = decoded(encoded, len(encoded), {"device": "cpu"})
        one, other = (decoded(encoded, size, decoder) for size in (len(encoded), max(1, len(encoded) * 3 // 8)))
        same = difference(one, other)["max"] == 0
        note(found, f"{kind}, {name}", difference(one, on_cpu) | {"same_in_other_batch": same})


def views(check: Check, found: Record) -> None:
    """Views on the device against those on the CPU from the same draws, in levels of 255, part by part."""
    side = check.image_size
    for name, reader, recipe, size in (
        ("resize alone, down", check.png, "eval-plain", side * 5 // 7),
        ("resize alone, up", check.png, "eval-plain", side * 9 // 7),
        ("simclr, as stored", check.stored, "simclr", side),
    ):
        count = min(check.sample, len(reader))
        given: Record = {"recipe": recipe, "size": size, "batch_size": min(_BATCH, count), "threads": 2}
        on_device, on_cpu = (first_views(reader, count, device=device, **given) for device in (check.device, "cpu"))
        note(found, name, difference(levels(on_device), levels(on_cpu)))
    note(found, "colour alone", colour_difference(check.encoded_sample(), side, check.device))


def purity(check: Check, found: Record) -> None:
    """Whether views on the device are the same, bit for bit, in another batch, with other threads, and after a restart."""
    kinds = {"resize, PNG": (check.png, "eval-plain"), "simclr, as stored": (check.stored, "simclr")}
    for name, (reader, recipe) in kinds.items():
        count = min(4 * _BATCH, len(reader))
        batch_size = min(_BATCH, count * 2 // 3)
        common: Record = {"recipe": recipe, "size": check.image_size, "device": check.device}
        usual = common | {"batch_size": batch_size, "threads": 4}
        first = first_views(reader, count, **usual)
        other = first_views(reader, count, batch_size=batch_size * 3 // 4, threads=1, **common)
        rest = first_views(reader, count - batch_size, step=1, **usual)
        note(found, f"{name}: again", identity(first, first_views(reader, count, **usual)))
        note(found, f"{name}: other batch and threads", identity(first, other))
        note(found, f"{name}: restart", identity(first[:, batch_size:], rest))
    found["all_identical"] = all(result["identical"] for result in found.values())


def note(found: Record, name: str, value: Any) -> None:
    found[name] = value
    print(f"    {name}: {value}", flush=True)


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


def by_pillow(encoded: np.ndarray) -> Image.Image:
    """The image, upright and in RGB."""
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def resampled(encoded: np.ndarray, subsampling: int) -> np.ndarray:
    """The image once more, as a JPEG with Pillow's subsampling of colour: 0 for none (4:4:4), 2 for 4:2:0."""
    file = io.BytesIO()
    by_pillow(encoded).save(file, "JPEG", quality=85, subsampling=subsampling)
    return np.frombuffer(file.getvalue(), np.uint8)


def first_views(
    reader: ShardReader, count: int, *, recipe: str, size: int, device: str, batch_size: int, threads: int, step: int = 0
) -> torch.Tensor:
    """The first views of an epoch from that step on: (V, count, 3, S, S) on the CPU."""
    loader = ViewLoader(
        reader,
        np.arange(len(reader)),
        batch_size=batch_size,
        image_size=size,
        recipe=get_recipe(recipe),
        seed=SEED,
        device=device,
        drop_last=False,
        threads=threads,
    )
    loader.load_state_dict({"epoch": 0, "step": step})
    batches = itertools.islice(loader, -(-count // batch_size))
    return torch.cat([batch.views.cpu() for batch in batches], dim=1)[:, :count]


def levels(views_VBCSS: torch.Tensor) -> np.ndarray:
    """Normalised views as levels of 255, (V * B, 3, S, S)."""
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (views_VBCSS.flatten(0, 1).numpy() * std + mean) * 255


def colour_difference(encoded: list[np.ndarray], side: int, device: str) -> dict[str, float]:
    """The colour step of the device (torch) against that of the CPU (Numba) on identical pixels and draws."""
    recipe = get_recipe("simclr")
    images_BHWC = np.stack([np.asarray(by_pillow(one).resize((side, side))) for one in encoded])
    sizes = np.full((len(encoded), 2), side)
    drawn = draw_views(np.arange(len(encoded)), seed=SEED, epoch=0, recipe=recipe, sizes=sizes)
    rows = np.ascontiguousarray(parameter_rows(drawn, recipe)[:, 0])
    on_cpu = np.empty((len(encoded), 3, side, side), np.float32)
    for out, image, row in zip(on_cpu, images_BHWC, rows, strict=True):
        resized_view_step(out, image, row)
    on_device = resized_view_batch(torch.from_numpy(images_BHWC).to(device), rows).cpu()
    return difference(levels(on_device[None]), levels(torch.from_numpy(on_cpu)[None]))


def difference(some: Iterable[np.ndarray], others: Iterable[np.ndarray]) -> dict[str, float]:
    """Mean, 99.9th percentile and maximum of the absolute difference, and the share of values that differ by more than 1."""
    pairs = zip(some, others, strict=True)
    d = np.concatenate([np.abs(np.subtract(a, b, dtype=np.float32)).ravel() for a, b in pairs])
    return {
        "mean": round(float(d.mean()), 4),
        "p99_9": round(float(np.percentile(d, 99.9)), 3),
        "max": round(float(d.max()), 3),
        "share_above_1": round(float((d > 1).mean()), 6),
    }


def identity(one_VBCSS: torch.Tensor, other_VBCSS: torch.Tensor) -> dict[str, Any]:
    """Whether two tensors of views are identical bit for bit; if not, the share of views that differ, and by how much."""
    different = one_VBCSS != other_VBCSS
    if not bool(different.any()):
        return {"identical": True}
    share = float(different.flatten(2).any(2).float().mean())
    largest = float(np.abs(levels(one_VBCSS) - levels(other_VBCSS)).max())
    return {"identical": False, "views": round(share, 4), "max_levels": round(largest, 4)}
