"""What the loader benchmark compares: who makes two views of every patch, each without end, in a process of its own.

A contender yields its batches as it hands them to a training loop, and has one under way for as long as that loop would. All
have the same patches and the same cores, and draw by themselves. What is timed is the steady state, so imports, compilation and
the first batches cost nothing.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

SEED = 42


@dataclasses.dataclass(frozen=True)
class Task:
    """What is read, and how it is timed.

    shards: folder of the shard set; its manifest names the files that it was built from. image_size: side of the views, pixels.
    warm: batches that are not timed; lap: batches that are, again and again until at least `seconds` have passed. rounds: of
    loader_parts alone, which keeps to one process. device: where the views are wanted.
    """

    shards: str
    cores: int
    batch_size: int
    image_size: int
    warm: int
    lap: int
    seconds: float
    rounds: int
    device: str = "cpu"


# Two views of a batch, each (B, 3, S, S) in its maker's own kind of array; or one array of images that were only decoded
Batch = Sequence[Any]


class Contender(NamedTuple):
    """stream: of batches, without end. blur: whether it blurs, and so is held against the others that do. devices: where it is
    measured unless it is asked for by name. needs: packages that not everyone has."""

    title: str
    stream: Callable[[Task], Iterator[Batch]]
    blur: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: tuple[str, ...] = ()


def measure(stream: Iterator[Batch], task: Task) -> dict[str, float]:
    """Patches/s of the steady state, by the clock on the wall."""
    for _ in itertools.islice(stream, task.warm):
        pass
    patches = batches = 0
    _synchronize(task.device)
    started = time.perf_counter()
    while (wall := time.perf_counter() - started) < task.seconds or not batches:
        for batch in itertools.islice(stream, task.lap):
            patches += len(batch[0])
            batches += 1
        _synchronize(task.device)
    return {"patches_per_s": patches / wall, "patches": patches, "batches": batches, "wall_s": wall}


def _synchronize(device: str) -> None:
    """Wait for all that was asked of a GPU on any stream, DALI's too."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


# ---- torchvision on Pillow, as in most notebooks ----


def torchvision(task: Task, *, recipe: str) -> Iterator[Batch]:
    """A DataLoader with a worker process per core; a GPU is given its batches. Its epochs end where the clock starts and is read:
    within one, the workers may be ahead by any number of batches, and what they had made before would count as made meanwhile."""
    from torch.utils.data import DataLoader

    from pipelines.shard_reader import ShardReader

    files = ShardReader(task.shards).manifest["source"].to_pylist()
    data: Any = _TwoViews(files, _torchvision_transform(recipe, task.image_size))
    order: Any = _Batches(len(data), task.batch_size, task.warm)
    on_gpu = task.device == "cuda"
    loader = DataLoader(data, batch_sampler=order, num_workers=task.cores, persistent_workers=True, pin_memory=on_gpu)
    while True:
        for batch in loader:
            yield [view.to(task.device, non_blocking=True) for view in batch]
        order.batches = task.lap


class _Batches:
    """So many batches of places in random order, each place once before any comes again."""

    def __init__(self, patches: int, batch_size: int, batches: int) -> None:
        self.patches, self.batch_size, self.batches = patches, batch_size, batches

    def __iter__(self) -> Iterator[list[int]]:
        import numpy as np

        generator = np.random.default_rng(SEED)
        places = (place for _ in itertools.count() for place in generator.permutation(self.patches).tolist())
        for _ in range(self.batches):
            yield list(itertools.islice(places, self.batch_size))


class _TwoViews:
    def __init__(self, files: Sequence[str], transform: Callable) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        from PIL import Image

        with Image.open(self.files[i]) as file:
            image = file.convert("RGB")
        return self.transform(image), self.transform(image)


def _torchvision_transform(recipe: str, size: int) -> Callable:
    import torchvision.transforms as T

    from pipelines.recipes import get_recipe, kernel_size

    r = get_recipe(recipe)
    assert r.crop and r.jitter
    j, blur = r.jitter, []
    if r.blur:
        blur.append(T.RandomApply([T.GaussianBlur(kernel_size(size, r.blur.kernel), r.blur.sigma)], r.blur.probability))
    return T.Compose(
        [
            T.RandomResizedCrop(size, r.crop.area, r.crop.ratio),
            T.RandomHorizontalFlip(r.flip),
            T.RandomApply([T.ColorJitter(j.brightness, j.contrast, j.saturation, j.hue)], j.probability),
            T.RandomGrayscale(r.grey),
            *blur,
            T.ToTensor(),
            T.Normalize(r.mean, r.std),
        ]
    )


# ---- On a GPU, without DALI: the files' bytes decoded by torchvision (there nvJPEG), the views made of tensors ----


def torchvision_v2(task: Task) -> Iterator[Batch]:
    """torchvision's transforms draw once for a call, so they are called for each view of each image."""
    import torch
    import torchvision.transforms.v2 as T

    from pipelines.recipes import get_recipe

    r = get_recipe("simclr")
    assert r.crop and r.jitter
    j = r.jitter
    transform = T.Compose(
        [
            T.RandomResizedCrop(task.image_size, r.crop.area, r.crop.ratio, antialias=True),
            T.RandomHorizontalFlip(r.flip),
            T.RandomApply([T.ColorJitter(j.brightness, j.contrast, j.saturation, j.hue)], j.probability),
            T.RandomGrayscale(r.grey),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(r.mean, r.std),
        ]
    )
    for images in _decoded_by_torchvision(task):
        yield [torch.stack([transform(image) for image in images]) for _ in range(2)]


def kornia(task: Task) -> Iterator[Batch]:
    """kornia's augmentations draw for each image of a batch and work on all at once, so the images have to be of one size."""
    import kornia.augmentation as K
    import torch

    from pipelines.recipes import get_recipe

    r = get_recipe("simclr")
    assert r.crop and r.jitter
    j = r.jitter
    transform = torch.nn.Sequential(
        # "resample" cuts out the whole batch at once, its default one image after the other.
        K.RandomResizedCrop((task.image_size, task.image_size), scale=r.crop.area, ratio=r.crop.ratio, cropping_mode="resample"),
        K.RandomHorizontalFlip(p=r.flip),
        K.ColorJitter(j.brightness, j.contrast, j.saturation, j.hue, p=j.probability),
        K.RandomGrayscale(p=r.grey),
        K.Normalize(torch.tensor(r.mean), torch.tensor(r.std)),
    ).to(task.device)
    for images in _decoded_by_torchvision(task):
        batch = torch.stack(images).float() / 255
        with torch.no_grad():
            yield [transform(batch) for _ in range(2)]


def _decoded_by_torchvision(task: Task) -> Iterator[list]:
    """Batches of images, (3, H, W) uint8 on the device, of the bytes as ours reads them."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    for encoded in _read_in_order(task):
        yield decode_jpeg([torch.tensor(one) for one in encoded], mode=ImageReadMode.RGB, device=task.device)


# ---- Ours ----


def ours(task: Task, *, recipe: str) -> Iterator[Batch]:
    """Epoch after epoch of the loader, with its pauses between them."""
    import numpy as np

    from pipelines.loader import ViewLoader
    from pipelines.recipes import get_recipe
    from pipelines.shard_reader import ShardReader

    reader = ShardReader(task.shards)
    with ViewLoader(
        reader,
        np.arange(len(reader)),
        batch_size=task.batch_size,
        image_size=task.image_size,
        recipe=get_recipe(recipe),
        seed=SEED,
        device=task.device,
        threads=task.cores,
    ) as loader:
        while True:
            for batch in loader:
                yield batch.views


# ---- DALI alone ----


def dali(task: Task, *, recipe: str) -> Iterator[Batch]:
    """DALI's own reader, random numbers and operators, which are near the recipe and not equal to it: contrast about 128, hue in
    YIQ, one order of the jitter, whole levels in between. Of several ways to write it this is the fastest that was found: an
    operation works on the chosen patches alone, grey goes by the colour space, and the blur's window is DALI's choice."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def

    from pipelines.recipes import get_recipe

    r = get_recipe(recipe)
    assert r.crop and r.jitter
    crop, j, blur = r.crop, r.jitter, r.blur
    tars = sorted(map(str, Path(task.shards).glob("*.tar")))

    def coin(probability):
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def factor(spread):
        return fn.random.uniform(range=[max(0.0, 1 - spread), 1 + spread])

    def view(x):
        x = fn.random_resized_crop(
            x, size=[task.image_size] * 2, random_area=list(crop.area), random_aspect_ratio=list(crop.ratio)
        )
        brightness, contrast, saturation = factor(j.brightness), factor(j.contrast), factor(j.saturation)
        hue = fn.random.uniform(range=[-360 * j.hue, 360 * j.hue])
        if coin(j.probability):
            x = fn.color_twist(x, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        if coin(r.grey):
            grey = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
            x = fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)
        if blur is not None:
            sigma = fn.random.uniform(range=list(blur.sigma))
            if coin(blur.probability):
                x = fn.gaussian_blur(x, sigma=sigma)
        return fn.crop_mirror_normalize(
            x,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * mean for mean in r.mean],
            std=[255 * std for std in r.std],
            mirror=fn.random.coin_flip(probability=r.flip),
        )

    @pipeline_def(enable_conditionals=True)
    def graph():
        encoded = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix("tar") + "idx" for tar in tars],
            ext=["jpg;png"],
            random_shuffle=True,
            missing_component_behavior="error",
        )
        images = fn.decoders.image(encoded, output_type=types.RGB, **_decoder(task.device))
        return view(images), view(images)

    pipeline = graph(batch_size=task.batch_size, num_threads=task.cores, device_id=_device_id(task.device), seed=SEED)
    while True:
        yield pipeline.run()


def decode(task: Task) -> Iterator[Batch]:
    """What every contender has to do at least: the bytes as ours reads them, decoded by DALI on the device."""
    return decoded(_read_in_order(task), task)


def decode_on_host(task: Task) -> Iterator[Batch]:
    """The same on the CPU, whatever the device."""
    return decode(dataclasses.replace(task, device="cpu"))


def _read_in_order(task: Task) -> Iterator[list]:
    """The bytes of batches, epoch after epoch in ours' order."""
    import numpy as np

    from pipelines.sampler import epoch_order
    from pipelines.shard_reader import ShardReader

    reader = ShardReader(task.shards)
    ids = np.arange(len(reader))
    steps = len(ids) // task.batch_size
    for epoch in itertools.count():
        order = epoch_order(ids, seed=SEED, epoch=epoch)
        yield from map(reader.read, np.split(order[: steps * task.batch_size], steps))


def _decoder(device: str) -> dict[str, Any]:
    """DALI's decoder's settings; on a GPU those of ours."""
    if device == "cpu":
        return {"device": "cpu"}
    from pipelines.dali_graph import _GPU_DECODER

    return _GPU_DECODER


def _device_id(device: str) -> int | None:
    return 0 if device == "cuda" else None


def decoded(encoded: Iterator[list], task: Task) -> Iterator[Batch]:
    """DALI's decoder on the device behind lists of encoded images. Each batch is one list of images."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali.pipeline import Pipeline

    device_id = _device_id(task.device)
    pipeline = Pipeline(batch_size=task.batch_size, num_threads=task.cores, device_id=device_id, prefetch_queue_depth=2)
    with pipeline:
        source = fn.external_source(source=encoded, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(source, output_type=types.RGB, **_decoder(task.device)))
    while True:
        yield pipeline.run()


def _of(function: Callable, recipe: str) -> Callable[[Task], Iterator[Batch]]:
    return functools.partial(function, recipe=recipe)


# In the order of the rounds
CONTENDERS = {
    "torchvision": Contender("torchvision on Pillow, a process per core", _of(torchvision, "simclr")),
    "torchvision-blur": Contender("torchvision on Pillow, blur", _of(torchvision, "simclr-blur"), blur=True, devices=("cpu",)),
    "torchvision-v2": Contender("torchvision v2 on decoded tensors", torchvision_v2, devices=("cuda",)),
    "kornia": Contender("kornia on decoded tensors", kornia, devices=("cuda",), needs=("kornia",)),
    "ours": Contender("ours, simclr", _of(ours, "simclr")),
    "ours-blur": Contender("ours, simclr-blur", _of(ours, "simclr-blur"), blur=True),
    "ours-pathology": Contender("ours, pathology", _of(ours, "pathology"), devices=("cpu",)),
    "dali": Contender("DALI's own operators, approximate", _of(dali, "simclr")),
    "dali-blur": Contender("DALI's own operators, approximate, blur", _of(dali, "simclr-blur"), blur=True, devices=("cpu",)),
    "decode": Contender("decoding alone, DALI", decode),
    "decode-on-host": Contender("decoding alone, DALI on the CPU", decode_on_host, devices=("cuda",)),
}


# ---- The process ----


def run_job(jobs: Mapping[str, Callable[[Task], dict]], name: str, given: str, result: str) -> None:
    """Do the job of that name on the first so many cores that this process may use, and write down what it returns."""
    task = Task(**json.loads(given))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.cores])
    os.environ["OMP_NUM_THREADS"] = str(task.cores)  # whatever the shell says; no library is imported yet
    Path(result).write_text(json.dumps(jobs[name](task)), encoding="utf-8")


def _measured(contender: Contender, task: Task) -> dict[str, float]:
    return measure(contender.stream(task), task)


if __name__ == "__main__":
    run_job({name: functools.partial(_measured, contender) for name, contender in CONTENDERS.items()}, *sys.argv[1:])
