"""Pixels for the GPU check: decoding by DALI alone, the first views of an epoch, and how far two sets of pixels are apart."""

import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from pipelines.loader import ViewLoader
from pipelines.recipes import IMAGENET_MEAN, IMAGENET_STD, get_recipe
from pipelines.shard_reader import ShardReader
from pipelines.view_kernels import parameter_rows, resized_view_step
from pipelines.view_kernels_torch import resized_view_batch
from pipelines.views import draw_views

SEED = 42

# DALI is imported inside the functions: where it is broken, the steps that do without it still have their results.


def decoders(device: str) -> dict[str, dict[str, Any]]:
    """Settings of DALI's decoder by name: as it comes, and as the loader has it."""
    from pipelines.dali_graph import _GPU_DECODER

    if device == "cpu":
        return {"defaults": {"device": "cpu"}, "as the loader": {"device": "cpu"}}
    return {"defaults": {"device": "mixed"}, "as the loader": _GPU_DECODER}


def decode_pipeline(batches: Iterable[list[np.ndarray]], batch_size: int, *, threads: int, decoder: dict[str, Any]):
    """A DALI pipeline that decodes and does nothing else. It works ahead, so give it more batches than are to be taken."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali.pipeline import Pipeline

    device_id = torch.cuda.current_device() if decoder["device"] == "mixed" else None
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=2)
    with pipeline:
        encoded = fn.external_source(source=batches, batch=True, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, **decoder))
    return pipeline


def decoded(encoded: list[np.ndarray], batch_size: int, decoder: dict[str, Any]) -> list[np.ndarray]:
    """Pixels of each image, (H, W, 3) uint8."""
    batches = [encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    pipeline = decode_pipeline(itertools.cycle(batches), batch_size, threads=4, decoder=decoder)
    images: list[np.ndarray] = []
    for _ in batches:
        (tensors,) = pipeline.run()
        on_host = tensors.as_cpu() if decoder["device"] == "mixed" else tensors
        images += [np.array(on_host[i]) for i in range(len(on_host))]
    return images


def encoded_batches(reader: ShardReader, batch_size: int) -> Iterator[list[np.ndarray]]:
    """Full batches of a shard set, without end."""
    for k in itertools.count():
        start = k * batch_size % (len(reader) - batch_size + 1)
        yield reader.read(np.arange(start, start + batch_size))


def by_pillow(encoded: np.ndarray) -> Image.Image:
    """The image, upright and in RGB."""
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def with_halved_colour(encoded: np.ndarray) -> np.ndarray:
    """The image once more, as a JPEG with colour at half the resolution (4:2:0)."""
    file = io.BytesIO()
    by_pillow(encoded).save(file, "JPEG", quality=85, subsampling=2)
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
