"""Other packages' loaders: each reads its own format as its guide shows, and all make the same views.

The views are those of the contender `torchvision`: its transforms on Pillow's images, without blur. So what differs is how
patches are stored, read and handed over. FFCV alone comes with operators of its own. Each package has an environment of its own,
since they need different versions of the same packages. Writing the format is not timed.
"""

import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders.loader import SEED, Batch, Files, Task, TwoViews, loader, source_files, torchvision_transform, whole_epochs

_SHARDS_PER_CORE = 4  # of tars: a process takes whole ones
_CHUNK = 64  # patches in a chunk of those that chunk them


class _Views(TwoViews):
    """Two views of what each package hands over."""

    def __init__(self, task: Task) -> None:
        super().__init__(torchvision_transform("simclr", task.image_size))

    def of_sample(self, sample: dict[str, bytes]) -> tuple[Any, Any]:
        return self(sample["image"])

    def of_samples(self, samples: list[dict[str, bytes]]) -> Any:
        from torch.utils.data import default_collate

        return default_collate([self.of_sample(sample) for sample in samples])


def _write_tars(task: Task, folder: str) -> list[str]:
    import webdataset

    files = source_files(task.shards)
    pattern, most = f"{folder}/shard-%06d.tar", -(-len(files) // (_SHARDS_PER_CORE * task.cores))
    with webdataset.ShardWriter(pattern, maxcount=most, verbose=0) as writer:
        for number, path in enumerate(files):
            writer.write({"__key__": f"{number:09d}", "jpg": Path(path).read_bytes()})
    return sorted(str(path) for path in Path(folder).glob("*.tar"))


def webdataset(task: Task) -> Iterator[Batch]:
    import webdataset as wds

    with tempfile.TemporaryDirectory() as folder:
        tars = _write_tars(task, folder)
        data = wds.WebDataset(tars, shardshuffle=len(tars), seed=SEED).shuffle(1000).to_tuple("jpg")
        batches = data.map_tuple(_Views(task)).map(lambda sample: sample[0]).batched(task.batch_size, partial=False)
        data_loader = wds.WebLoader(batches, batch_size=None, num_workers=task.cores, persistent_workers=True)
        yield from whole_epochs(lambda: data_loader, task)


def litdata(task: Task) -> Iterator[Batch]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{folder}/cache"  # by default one place for all on this machine
        import litdata as lit

        chunks, files = f"{folder}/chunks", source_files(task.shards)
        written: dict[str, Any] = {"chunk_size": _CHUNK, "num_workers": task.cores, "verbose": False}
        lit.optimize(fn=_litdata_sample, inputs=files, output_dir=chunks, **written)
        data = lit.StreamingDataset(chunks, shuffle=True, drop_last=True, seed=SEED, transform=_Views(task).of_sample)
        data_loader = lit.StreamingDataLoader(data, batch_size=task.batch_size, num_workers=task.cores, persistent_workers=True)
        yield from whole_epochs(lambda: data_loader, task)


def _litdata_sample(path: str) -> dict[str, bytes]:
    return {"image": Path(path).read_bytes()}


def mosaicml(task: Task) -> Iterator[Batch]:
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    with tempfile.TemporaryDirectory() as folder:
        with MDSWriter(out=folder, columns={"image": "bytes"}) as writer:
            for path in source_files(task.shards):
                writer.write({"image": Path(path).read_bytes()})
        data_loader = DataLoader(
            StreamingDataset(local=folder, shuffle=True, shuffle_seed=SEED, batch_size=task.batch_size),
            batch_size=task.batch_size,
            num_workers=task.cores,
            persistent_workers=True,
            drop_last=True,
            collate_fn=_Views(task).of_samples,
        )
        yield from whole_epochs(lambda: data_loader, task)


def spdl(task: Task) -> Iterator[Batch]:
    """In threads, which is what it is for."""
    import numpy as np
    from spdl.pipeline import PipelineBuilder
    from torch.utils.data import default_collate

    files, views, generator = source_files(task.shards), _Views(task), np.random.default_rng(SEED)

    def epoch() -> Iterator[Batch]:
        pipeline = (
            PipelineBuilder()
            .add_source([files[place] for place in generator.permutation(len(files))])
            .pipe(lambda path: views(Path(path).read_bytes()), concurrency=task.cores)
            .aggregate(task.batch_size, drop_last=True)
            .pipe(default_collate)
            .add_sink(2)
            .build(num_threads=task.cores)
        )
        with pipeline.auto_stop():
            yield from pipeline

    yield from whole_epochs(epoch, task)


def ray_data(task: Task) -> Iterator[Batch]:
    import ray

    views = _Views(task)

    def both(row: dict[str, Any]) -> dict[str, Any]:
        first, second = views(row["jpg"])
        return {"first": first.numpy(), "second": second.numpy()}

    os.environ["RAY_ADDRESS"] = "local"  # whatever cluster this machine is part of
    with (
        tempfile.TemporaryDirectory() as folder,
        ray.init(num_cpus=task.cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR),
    ):
        ray.data.DataContext.get_current().enable_progress_bars = False
        data = ray.data.read_webdataset(_write_tars(task, folder), decoder=None, shuffle="files").map(both)

        def epoch() -> Iterator[Batch]:
            for batch in data.iter_torch_batches(batch_size=task.batch_size, drop_last=True):
                yield [batch["first"], batch["second"]]

        yield from whole_epochs(epoch, task)


def ffcv(task: Task) -> Iterator[Batch]:
    """Its own operators, of which none changes hue and none makes grey. A field has one view, so that patches are stored twice.

    It is built from source: Debian's libopencv-dev, libturbojpeg0-dev, pkg-config and g++ have to be there.
    """
    import numpy as np
    from ffcv import transforms
    from ffcv.fields import RGBImageField
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    def view() -> list[Any]:
        jitter = transforms.RandomBrightness, transforms.RandomContrast, transforms.RandomSaturation
        return [
            RandomResizedCropRGBImageDecoder((task.image_size, task.image_size)),
            transforms.RandomHorizontalFlip(),
            *(each(0.8, p=0.8) for each in jitter),
            transforms.NormalizeImage(np.zeros(3), np.full(3, 255.0), np.float32),
            transforms.ToTensor(),
            transforms.ToTorchImage(),
        ]

    with tempfile.TemporaryDirectory() as folder:
        fields = {name: RGBImageField(write_mode="jpg", jpeg_quality=90) for name in ("first", "second")}
        images = Files(source_files(task.shards), _same_pixels_twice)
        DatasetWriter(f"{folder}/patches.beton", fields, num_workers=1).from_indexed_dataset(images)
        sizes: dict[str, Any] = {"batch_size": task.batch_size, "num_workers": task.cores, "seed": SEED}
        pipelines = {"first": view(), "second": view()}
        data_loader = Loader(f"{folder}/patches.beton", order=OrderOption.RANDOM, pipelines=pipelines, **sizes)
        yield from whole_epochs(lambda: data_loader, task)


def _same_pixels_twice(encoded: bytes) -> tuple[Any, Any]:
    """For two fields."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as file:
        pixels = np.asarray(file.convert("RGB"))
    return pixels, pixels


# In the order of the rounds, after the others; only where --peers or --contenders asks for them
CONTENDERS = {
    "webdataset": loader("webdataset, torchvision on Pillow, a process per core", webdataset, "none"),
    "litdata": loader("litdata, torchvision on Pillow, a process per core", litdata, "none"),
    "mosaicml": loader("mosaicml-streaming, torchvision on Pillow, a process per core", mosaicml, "none"),
    "spdl": loader("SPDL, torchvision on Pillow, a thread per core", spdl, "none"),
    "ray-data": loader("Ray Data, torchvision on Pillow, a task per core", ray_data, "none"),
    "ffcv": loader("FFCV, its own operators without hue and grey, a thread per core", ffcv, "none"),
}
