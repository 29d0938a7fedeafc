"""Contenders of the loader benchmark: each makes two views of every patch, without end.

A contender yields its batches as it hands them to a training loop, and has as many under way as that loop would. All have the
same patches and the same cores, and draw by themselves. The steady state is timed: imports, compilation and the first batches
cost nothing. `parts` and `memory` measure our loader alone. All are one file, so that what each does besides the views can be
compared side by side.
"""

import dataclasses
import functools
import io
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from worker import Contender, own_memory, steady_state

SEED = 42
EPOCHS = 10  # of the loader whose memory is measured
_EPOCH_BATCHES = 2  # of it: as many as are under way at once
_PART_BATCHES = 4  # that each part works on, or fewer where the set has no more
_RECIPE = "simclr"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is read, and how it is timed.

    shards: folder of the shard set; its manifest names the files that it was built from. image_size: side of the views, pixels.
    warm: batches that are not timed; lap: batches that are, again and again until at least `seconds` have passed. rounds: of
    `parts`, which keeps to one process. device: where the views are wanted.
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


def measure(stream: Callable[[Task], Iterator[Batch]], task: Task) -> dict[str, float]:
    """Patches/s of the steady state, by the wall clock."""
    timed: dict[str, Any] = {"warm": task.warm, "lap": task.lap, "seconds": task.seconds, "device": task.device}
    count, wall, _ = steady_state(stream(task), lambda batch: None, **timed)
    patches = count * task.batch_size
    return {"patches_per_s": patches / wall, "patches": patches, "batches": count, "wall_s": wall}


def whole_epochs(epoch: Callable[[], Iterable[Batch]], task: Task) -> Iterator[Batch]:
    """Epochs between which the clock starts and is read. Within one, a loader may be ahead by any number of batches, and what it
    had made before would count as made meanwhile."""
    last = deque(enumerate(epoch(), 1), maxlen=1)
    count, batch = last[0] if last else (0, ())
    if count != task.lap:
        raise ValueError(f"its epoch has {count} batches, not {task.lap}: give patches that divide by the batch and the cores")
    yield from itertools.repeat(batch, task.warm)
    while True:
        yield from epoch()


# ---- torchvision on Pillow, as in most notebooks ----


def torchvision(task: Task, *, recipe: str) -> Iterator[Batch]:
    """A DataLoader with a worker process per core; a GPU is given its batches."""
    from torch.utils.data import DataLoader, RandomSampler

    data: Any = Files(source_files(task.shards), TwoViews(torchvision_transform(recipe, task.image_size)))
    order = RandomSampler(data, num_samples=task.lap * task.batch_size)  # each patch once before any comes again
    loader: Iterable = DataLoader(
        data,
        task.batch_size,
        sampler=order,
        num_workers=task.cores,
        persistent_workers=True,
        pin_memory=task.device == "cuda",
    )
    for batch in whole_epochs(lambda: loader, task):
        yield [view.to(task.device, non_blocking=True) for view in batch]


class TwoViews:
    """An image's bytes -> its two views. It travels to other processes."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, encoded: bytes) -> tuple[Any, Any]:
        from PIL import Image

        with Image.open(io.BytesIO(encoded)) as file:
            image = file.convert("RGB")
        return self.transform(image), self.transform(image)


class Files:
    """A dataset of what `make` makes of each file's bytes."""

    def __init__(self, files: Sequence[str], make: Callable[[bytes], Any]) -> None:
        self.files, self.make = files, make

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Any:
        return self.make(Path(self.files[i]).read_bytes())


def source_files(shards: str) -> list[str]:
    """The files that a shard set was built from."""
    from sharding.manifest import read_manifest

    return read_manifest(shards, columns=["source"])["source"].to_pylist()


def torchvision_transform(recipe: str, size: int) -> Callable:
    """A Pillow image -> a view."""
    from torchvision import transforms as T

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


# ---- kornia, on a GPU ----


def kornia(task: Task) -> Iterator[Batch]:
    """kornia's augmentations draw for each image of a batch and work on all at once, so the images have to be of one size."""
    import kornia.augmentation as K
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    from pipelines.recipes import get_recipe

    r = get_recipe(_RECIPE)
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
    for encoded in _encoded(task):
        read: Any = [torch.tensor(one) for one in encoded]
        images: Any = decode_jpeg(read, mode=ImageReadMode.RGB, device=task.device)  # by nvJPEG on a GPU
        batch = torch.stack(images).float() / 255
        with torch.no_grad():
            yield [transform(batch) for _ in range(2)]


# ---- Ours ----


def our_loader(shards: Any, *, recipe: str = _RECIPE, patches: int | None = None, **settings: Any) -> Any:
    """A ViewLoader of the first patches of a set (None: all). shards: its folder or reader."""
    import numpy as np

    from pipelines.loader import ViewLoader
    from pipelines.recipes import get_recipe
    from pipelines.shard_reader import ShardReader

    reader = shards if isinstance(shards, ShardReader) else ShardReader(shards)
    ids = np.arange(len(reader) if patches is None else min(patches, len(reader)))
    return ViewLoader(reader, ids, recipe=get_recipe(recipe), seed=SEED, **settings)


def ours(task: Task, *, recipe: str, threads: int = 0) -> Iterator[Batch]:
    """Epoch after epoch of the loader, with its pauses between them. threads: 0 for one per core."""
    sizes: dict[str, Any] = {"batch_size": task.batch_size, "image_size": task.image_size}
    with our_loader(task.shards, recipe=recipe, device=task.device, threads=threads or task.cores, **sizes) as loader:
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
        mean, std = ([255 * each for each in values] for values in (r.mean, r.std))
        flip = fn.random.coin_flip(probability=r.flip)
        return fn.crop_mirror_normalize(x, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, mirror=flip)

    @pipeline_def(enable_conditionals=True)
    def graph():
        encoded = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix("tar") + "idx" for tar in tars],
            ext=["jpg;png"],
            random_shuffle=True,
            missing_component_behavior="error",
        )
        images = fn.decoders.image(encoded, output_type=types.RGB, **our_decoder(task.device))
        return view(images), view(images)

    device_id = 0 if task.device == "cuda" else None
    pipeline = graph(batch_size=task.batch_size, num_threads=task.cores, device_id=device_id, seed=SEED)
    while True:
        yield pipeline.run()


def decode(task: Task) -> Iterator[Batch]:
    """What every contender has to do at least: the bytes as ours reads them, decoded by DALI on the device."""
    pipeline = decode_pipeline(_encoded(task), task.batch_size, threads=task.cores, decoder=our_decoder(task.device))
    while True:
        yield pipeline.run()


def _encoded(task: Task) -> Iterator[list]:
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


def our_decoder(device: str) -> dict[str, Any]:
    """The settings of DALI's decoder that our loader has."""
    from pipelines.dali_graph import _GPU_DECODER

    return _GPU_DECODER if device == "cuda" else {"device": "cpu"}


def decode_pipeline(batches: Iterable[list], batch_size: int, *, threads: int, decoder: dict[str, Any]) -> Any:
    """A DALI pipeline that decodes lists of encoded images and does nothing else. It works ahead."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali.pipeline import Pipeline

    device_id = 0 if decoder["device"] == "mixed" else None
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=2)
    with pipeline:
        encoded = fn.external_source(source=batches, batch=True, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, **decoder))
    return pipeline


# ---- Our loader, part by part ----

# Name -> title, in the order in which a patch passes them. "loader" is all of them and whatever else it does.
PARTS = {
    "reading": "reading: slices of the mapped tars (ShardReader.read)",
    "drawing": "drawing both views' parameters (draw_views)",
    "decoding": "decoding (DALI)",
    "views": "both views of the decoded image (view_step, Numba)",
    "loader": "the whole loader",
}


def parts(task: Task) -> dict[str, Any]:
    """CPU milliseconds per patch of every part, round by round, of all threads of the process. One core and one thread, so that
    no part waits for another."""
    import numpy as np
    import torch

    from pipelines.recipes import get_recipe
    from pipelines.shard_reader import ShardReader
    from pipelines.view_kernels_numba import parameter_rows, view_step
    from pipelines.views import draw_views

    assert task.cores == 1, task
    torch.set_num_threads(1)
    recipe, reader = get_recipe(_RECIPE), ShardReader(task.shards)
    count = min(_PART_BATCHES, len(reader) // task.batch_size)
    patches = count * task.batch_size
    batches = np.split(np.arange(patches), count)

    def draw(ids):
        return draw_views(reader.draw_keys(ids), seed=SEED, epoch=0, recipe=recipe, sizes=reader.sizes[ids])

    def make_views() -> None:
        for image, both in zip(images, rows, strict=True):
            for row in both:
                view_step(out, image, row)

    cycle = map(reader.read, itertools.cycle(batches))
    pipeline = decode_pipeline(cycle, task.batch_size, threads=1, decoder=our_decoder("cpu"))
    images = [np.array(images.at(i)) for (images,) in (pipeline.run() for _ in batches) for i in range(task.batch_size)]
    rows = np.concatenate([parameter_rows(draw(ids), recipe) for ids in batches])
    out = np.empty((3, task.image_size, task.image_size), np.float32)
    sizes: dict[str, Any] = {"batch_size": task.batch_size, "image_size": task.image_size}
    with our_loader(reader, patches=patches, threads=1, **sizes) as loader:
        work: dict[str, Callable[[], Any]] = {
            "reading": lambda: [reader.read(ids) for ids in batches],
            "drawing": lambda: [draw(ids) for ids in batches],
            "decoding": lambda: [pipeline.run() for _ in batches],
            "views": make_views,
            "loader": lambda: deque(loader, maxlen=0),  # a whole epoch: before it and after it nothing is under way
        }
        for once in work.values():  # compiles, maps and allocates
            once()
        found: dict[str, list[float]] = {name: [] for name in PARTS}
        for _, (name, once) in itertools.product(range(task.rounds), work.items()):
            found[name].append(_cpu_ms(once, task.seconds) / patches)
    return {"patches": patches, "ms": found}


def _cpu_ms(once: Callable[[], Any], seconds: float) -> float:
    """CPU milliseconds of `once`: a mean over so many times as take so many seconds."""
    started, times, spent = time.process_time(), 0, 0.0
    while not times or spent < seconds:
        once()
        times += 1
        spent = time.process_time() - started
    return 1000 * spent / times


def memory(task: Task) -> dict[str, Any]:
    """Resident memory at the end of each of ten short epochs of our loader, and the most at any time, bytes.

    The tars' pages that it has mapped are in it, as the system counts them.
    """
    resident = []
    sizes: dict[str, Any] = {"batch_size": task.batch_size, "image_size": task.image_size, "threads": task.cores}
    with our_loader(task.shards, patches=_EPOCH_BATCHES * task.batch_size, **sizes) as loader:
        for _ in range(EPOCHS):
            deque(loader, maxlen=0)
            resident.append(own_memory("VmRSS"))
    peak = max(own_memory("VmHWM"), *resident)  # Linux counts by thread and adds up now and then, so the peak may lag a little
    return {"resident_bytes": resident, "peak_bytes": peak}


def loader(title: str, stream: Callable[..., Iterator[Batch]], *devices: str, needs: tuple[str, ...] = (), **given: Any):
    """stream: (task, **given) -> batches without end, which are timed."""
    run = functools.partial(measure, functools.partial(stream, **given))
    return Contender(title, run, needs=needs, devices=devices or ("cpu", "cuda"))


# In the order of the rounds. Those that end with -blur are compared with one another.
LOADERS = {
    "torchvision": loader("torchvision on Pillow, a process per core", torchvision, recipe="simclr"),
    "torchvision-blur": loader("torchvision on Pillow, blur", torchvision, "cpu", recipe="simclr-blur"),
    "kornia": loader("kornia on decoded tensors", kornia, "cuda", needs=("kornia",)),
    "ours": loader("ours, simclr", ours, recipe="simclr"),
    "ours-blur": loader("ours, simclr-blur", ours, recipe="simclr-blur"),
    "ours-pathology": loader("ours, pathology", ours, "cpu", recipe="pathology"),
    "dali": loader("DALI's own operators, approximate", dali, recipe="simclr"),
    "dali-blur": loader("DALI's own operators, approximate, blur", dali, "cpu", recipe="simclr-blur"),
    "decode": loader("decoding alone, DALI", decode),
    "ours-4-threads": loader("ours, simclr, 4 threads", ours, "threads", recipe="simclr", threads=4),
    "ours-8-threads": loader("ours, simclr, 8 threads", ours, "threads", recipe="simclr", threads=8),
}
CONTENDERS = LOADERS | {
    "parts": Contender("CPU time by part", parts, devices=("cpu",)),
    "memory": Contender("memory", memory, devices=("cpu",)),
}
