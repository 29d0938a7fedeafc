"""Everything that only a GPU can tell, in one command of at most 4 minutes.

    python benchmarks/gpu_check.py --out benchmarks/results           # on a host with a GPU
    python benchmarks/gpu_check.py --out /tmp/check --dry             # the same code on a CPU, tiny, in a minute

It draws its own patches, packs them, and then, step by step: decodes on the device and holds the pixels against the CPU's;
does the same for resize, colour and whole views; asks whether a view stays the same, bit for bit, in another batch and after
a restart; measures the loader alone, the model alone, and both together in the project's own training loop.

Every result is written at once to <out>/<date>-gpu-check-<device>.json, so that a run that is cut off keeps what it has; a
Markdown table follows at the end. A step that fails is written down with its error and the next one begins; the exit code
is then 1. `--steps` runs only some of them.
"""

import dataclasses
import faulthandler
import functools
import io
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

# torch, DALI and whatever imports them are imported inside the steps: where one of them is missing or broken, the steps that
# do not need it still have their results. It also keeps them out of the processes that draw.
from sharding.command import option, required, run_script  # noqa: E402
from sharding.manifest import read_dataset  # noqa: E402
from sharding.packing import build_shards  # noqa: E402
from sharding.synthetic import LAYOUTS, draw_set  # noqa: E402
from sharding.synthetic import Config as DrawConfig  # noqa: E402
from sharding.workers import available_cores  # noqa: E402

SEED = 42
TEMPERATURE, PROJECTION_DIM = 0.5, 128
_ORGAN = "kidney"  # unlabelled, and the quicker one to draw

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is checked, and how large."""

    out: str = required("folder for the results")
    dry: bool = option(False, "the same code on the CPU with tiny sizes")
    data: str | None = option(None, "a shard set to use; default: patches are drawn")
    steps: list[str] = option([], "only these steps; default: all (their names are the rows of the table)")
    seconds: float = option(220.0, "time for everything; steps that no longer fit are skipped")
    backbone: str | None = option(None, "any timm model; default: resnet50 (dry: test_resnet)")
    image_size: int | None = option(None, "side of patches and views, pixels; default: 224 (dry: 64)")
    batch_size: int | None = option(None, "patches per step; default: 256 (dry: 8)")
    patches: int | None = option(None, "patches to draw; default: 4096 (dry: 48)")
    commit: str | None = option(None, "the code's commit, where the host has the files without their history")


@dataclasses.dataclass
class Setting:
    """What the steps share."""

    config: Config
    folder: Path  # temporary
    device: str
    image_size: int
    batch_size: int
    backbone: str
    patches: int
    sample: int  # patches whose pixels are compared
    deadline: float
    results: dict[str, Result]
    shards: Path | None = None
    png_shards: Path | None = None  # the sample once more as PNG, which is decoded on the CPU everywhere

    @property
    def dry(self) -> bool:
        return self.config.dry

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @functools.cached_property
    def reader(self) -> Any:
        """Of the shard set. Raises RuntimeError where the step that makes it failed."""
        return _reader(self.shards)

    @functools.cached_property
    def png_reader(self) -> Any:
        """Of the PNG set."""
        return _reader(self.png_shards)


def _reader(folder):
    from pipelines.shards import ShardReader

    if folder is None:
        raise RuntimeError("there is no data: the step 'data' failed or was left out")
    return ShardReader(folder)


# ---- The steps. Each puts plain data into `found` as it goes, so that what it found before it failed is kept. ----


def environment(s: Setting, found: Result) -> None:
    """What this was measured on."""
    import torch

    from train.runs import versions

    found |= {
        "machine": platform.platform(),
        "cores": available_cores(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count(),
    }
    if s.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
        fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        query = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True)
        found["nvidia_smi"] = query.stdout.strip() or query.stderr.strip()


def data(s: Setting, found: Result) -> None:
    """Draw patches and pack them, or take the set that was given; and a sample of it as PNG."""
    from pipelines.reference import decode as decode_by_pillow

    cores = available_cores()
    if s.config.data is not None:
        s.shards = Path(s.config.data)
    else:
        started = time.monotonic()
        drawn = draw_set(DrawConfig(str(s.folder / "drawn"), _ORGAN, s.patches, s.image_size, seed=SEED, workers=cores))
        found["draw_seconds"] = round(time.monotonic() - started, 1)
        started = time.monotonic()
        build_shards([drawn], s.folder / "shards", layout=LAYOUTS[_ORGAN], unlabelled=True, workers=cores, seed=SEED)
        found["build_seconds"] = round(time.monotonic() - started, 1)
        s.shards = s.folder / "shards"
    ids = np.arange(min(s.sample, len(s.reader)))
    (s.folder / "png").mkdir()
    for i, encoded in zip(ids, s.reader.read(ids), strict=True):
        Image.fromarray(decode_by_pillow(encoded).permute(1, 2, 0).numpy()).save(s.folder / "png" / f"{i:06d}.png")
    build_shards([s.folder / "png"], s.folder / "png_shards", unlabelled=True, workers=1, seed=SEED)
    s.png_shards = s.folder / "png_shards"
    sizes = s.reader.manifest["size"].to_numpy()
    found |= {
        "set": read_dataset(s.shards)["name"],
        "patches": len(s.reader),
        "mean_kilobytes": round(float(sizes.mean()) / 1e3, 1),
        "side": s.reader.sizes[0].tolist(),
    }


def decode(s: Setting, found: Result) -> None:
    """Decoding on the device against DALI's own on the CPU, in levels of 255, and whether it depends on the batch.

    Also for JPEGs with halved colour resolution (4:2:0), the usual kind, where the way of enlarging colour matters; and with
    the decoder's options that may bring the device nearer to the CPU, and make an image's pixels its own affair.
    """
    stored = s.reader.read(np.arange(min(s.sample, len(s.reader))))
    kinds = {"as stored": stored, "4:2:0": [_as_420(encoded) for encoded in stored]}
    options: dict[str, Result] = {
        "defaults": {},
        "fancy": {"jpeg_fancy_upsampling": True},
        "fancy, no hardware": {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0},
        "fancy, all hardware": {"jpeg_fancy_upsampling": True, "hw_decoder_load": 1.0},
    }
    for kind, encoded in kinds.items():
        on_cpu = _decoded(encoded, "cpu", batch=len(encoded))
        for name, chosen in options.items():
            one, other = (_decoded(encoded, s.device, batch=b, **chosen) for b in (len(encoded), max(1, len(encoded) * 3 // 8)))
            key = f"{kind}, {name}"
            found[key] = _difference(one, on_cpu) | {"same_in_other_batch": _difference(one, other)["max"] == 0}
            print(f"    {key}: {found[key]}", flush=True)


def views(s: Setting, found: Result) -> None:
    """Views on the device against those on the CPU from the same draws, in levels of 255, part by part."""
    side = s.image_size
    parts: list[tuple[str, Any, str, int]] = [
        ("resize alone, down", s.png_reader, "eval-plain", side * 5 // 7),
        ("resize alone, up", s.png_reader, "eval-plain", side * 9 // 7),
        ("simclr, PNG", s.png_reader, "simclr", side),
        ("simclr, as stored", s.reader, "simclr", side),
    ]
    for name, reader, recipe, size in parts[1::2] if s.dry else parts:  # colours compile for seconds on a CPU
        on_device, on_cpu = (
            _first_views(reader, s.sample, device=device, batch=min(32, s.sample), recipe=recipe, size=size, threads=2)
            for device in (s.device, "cpu")
        )
        found[name] = _difference(list(_levels(on_device)), list(_levels(on_cpu)))
        print(f"    {name}: {found[name]}", flush=True)
    found["colour alone"] = _colour_difference(s)
    print(f"    colour alone: {found['colour alone']}", flush=True)


def purity(s: Setting, found: Result) -> None:
    """Whether views on the device are the same, bit for bit, in another batch, with other threads, and after a restart."""
    count, batch = (16, 8) if s.dry else (128, 32)
    sets = [
        ("resize, PNG", s.png_reader, "eval-plain"),
        ("simclr, PNG", s.png_reader, "simclr"),
        ("simclr, as stored", s.reader, "simclr"),
    ]
    changes: dict[str, Result] = {
        "other batch and threads": {"batch": batch * 3 // 4, "threads": 1},
        "other batch": {"batch": batch * 3 // 4, "threads": 4},
        "again": {"batch": batch, "threads": 4},
    }
    for name, reader, recipe in sets[:1] if s.dry else sets:  # the colours compile, see above
        n = min(count, len(reader))
        common: Result = {"device": s.device, "recipe": recipe, "size": s.image_size}
        first = _first_views(reader, n, batch=batch, threads=4, **common)
        for case, changed in changes.items():
            found[f"{name}: {case}"] = _bits(first, _first_views(reader, n, **changed, **common))
        if n > batch:  # otherwise there is no middle to restart in
            rest = _first_views(reader, n - batch, batch=batch, threads=4, step=1, **common)
            found[f"{name}: restart"] = _bits(first[:, batch:], rest)
    for case, result in found.items():
        print(f"    {case}: {result}", flush=True)
    found["all_identical"] = all(result["identical"] for result in found.values())


def loader(s: Setting, found: Result) -> None:
    """The loader alone, and decoding alone, for several thread counts: medians over interleaved repetitions of an epoch."""
    import torch

    from pipelines.loader import ViewLoader
    from pipelines.recipes import get_recipe

    cores = available_cores()
    counts = [1] if s.dry else [t for t in (4, 8, 16) if t <= cores] or [cores]
    ids = np.arange(len(s.reader))
    batch = min(s.batch_size, len(ids))
    make = functools.partial(
        ViewLoader, s.reader, ids, batch_size=batch, image_size=s.image_size, recipe=get_recipe("simclr"), seed=SEED
    )
    loaders = {t: make(device=s.device, threads=t) for t in counts}
    decoders = {t: _Decoder(s.reader, batch, s.device, threads=t) for t in counts}
    steps = len(ids) // batch
    for t in counts:  # warm-up: kernels are loaded, buffers grow
        for _ in itertools.islice(loaders[t], 3):
            pass
        decoders[t].run(3)
    found |= {"batch_size": batch, "batches": steps}
    if s.device == "cuda" and steps > 1:
        found["host_waits_per_batch"] = _host_waits(loaders[counts[0]])
    rates: dict[str, list[float]] = {f"{what} {t}": [] for t in counts for what in ("loader", "decode")}
    ends = time.monotonic() + min(30.0, s.left - 60)
    for repetition in range(2 if s.dry else 5):
        if repetition and time.monotonic() > ends:
            break
        for t in counts:
            loaders[t].load_state_dict({"epoch": repetition + 1, "step": 0})
            _synchronize(s.device)
            started = time.perf_counter()
            for _ in loaders[t]:
                pass
            _synchronize(s.device)
            rates[f"loader {t}"].append(steps * batch / (time.perf_counter() - started))
            rates[f"decode {t}"].append(decoders[t].run(steps))
    for t in counts:
        patches, decoding = statistics.median(rates[f"loader {t}"]), statistics.median(rates[f"decode {t}"])
        found[f"{t} threads"] = {
            "patches_per_s": round(patches, 1),
            "views_per_s": round(2 * patches, 1),
            "decode_patches_per_s": round(decoding, 1),
            "loader_to_decode": round(patches / decoding, 3),
            "repetitions": [round(rate, 1) for rate in rates[f"loader {t}"]],
            "decode_repetitions": [round(rate, 1) for rate in rates[f"decode {t}"]],
        }
        print(f"    {t} threads: {found[f'{t} threads']}", flush=True)
    if s.device == "cuda":
        torch.cuda.empty_cache()


def model(s: Setting, found: Result) -> None:
    """The model alone, on views that lie on the device: as the training loop runs it, and with cuDNN's own search."""
    import torch

    found["plain"] = _model_speed(s)
    print(f"    plain: {found['plain']}", flush=True)
    if s.device == "cuda":
        torch.backends.cudnn.benchmark = True
        try:
            found["cudnn.benchmark"] = _model_speed(s)
        finally:
            torch.backends.cudnn.benchmark = False
        print(f"    cudnn.benchmark: {found['cudnn.benchmark']}", flush=True)


def joint(s: Setting, found: Result) -> None:
    """Pretraining by the project's own loop, loader and model together, for some hundred steps in bf16."""
    import torch

    from train.loop import Job, fit, plain_place
    from train.methods import SimCLR
    from train.runs import Run

    ids = np.arange(len(s.reader))
    batch = min(s.batch_size, len(ids))
    per_epoch = len(ids) // batch
    speed = s.results.get("model", {}).get("plain", {}).get("steps_per_s", 3.0)
    # Half as fast as the model alone must still fit, with time to begin and end.
    wanted = 6 if s.dry else max(20, min(300, round(min(60.0, s.left - 40) * speed * 0.5)))
    log_every = 20 if wanted >= 100 else max(1, wanted // 5)
    epochs = -(-wanted // per_epoch)
    folder = s.folder / "run"
    folder.mkdir()
    job = Job(
        folder=folder,
        data=Path(s.reader.folder).absolute(),
        ids=ids,
        method=SimCLR(PROJECTION_DIM, TEMPERATURE),
        backbone=s.backbone,
        init="scratch",
        image_size=s.image_size,
        batch_size=batch,
        epochs=epochs,
        optimizer="lars",
        peak_learning_rate=0.3 * batch / 256,
        weight_decay=1e-6,
        warmup_epochs=epochs / 10,
        precision="fp32" if s.dry else "bf16",  # few CPUs know bf16
        seed=SEED,
        threads=0,
        compile=False,
        log_every=log_every,
        checkpoint_every=10**9,  # writing hundreds of megabytes is not what is measured
        max_failures=0,
        card={},
    )
    if s.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    fit(job, plain_place(folder, torch.device(s.device)))
    seconds = time.monotonic() - started
    rows = Run(folder).metrics()
    steady = rows[1:] or rows  # kernels are chosen and loaded in the first one
    patches = statistics.median(row["patches_per_s"] for row in steady)
    found |= {
        "steps": job.steps,
        "batch_size": batch,
        "seconds": round(seconds, 1),
        "patches_per_s": round(patches, 1),
        "img_per_s": round(2 * patches, 1),
        "patches_per_s_range": [min(r["patches_per_s"] for r in steady), max(r["patches_per_s"] for r in steady)],
        "data_wait": round(statistics.median(row["data_wait"] for row in steady), 4),
        "loss_first": round(rows[0]["loss"], 4),
        "loss_last": round(rows[-1]["loss"], 4),
        "loss_of_chance": round(float(np.log(2 * batch - 1)), 4),
    }
    if s.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["torch_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["device_in_use_gib"] = round((total - free) / 2**30, 2)  # DALI's memory and torch's cache too
    alone = s.results.get("model", {}).get("plain", {}).get("img_per_s")
    if alone:
        found["joint_to_model"] = round(found["img_per_s"] / alone, 3)


def compiled(s: Setting, found: Result) -> None:
    """The model alone under torch.compile. Last, because nothing can hold it to a time."""
    found |= _model_speed(s, compile=True)


# name -> (function, seconds that must be left to begin with it). Those in NO_DATA need no patches.
NO_DATA = ("environment", "model", "compiled")
STEPS: dict[str, tuple[Callable[[Setting, Result], None], float]] = {
    "environment": (environment, 0),
    "data": (data, 0),
    "decode": (decode, 15),
    "views": (views, 15),
    "purity": (purity, 15),
    "model": (model, 20),
    "loader": (loader, 25),
    "joint": (joint, 45),
    "compiled": (compiled, 80),
}


# ---- Decoding ----


def _pipeline(source, batch: int, device: str, threads: int, **options):
    """A DALI pipeline that decodes and does nothing else."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    import torch
    from nvidia.dali.pipeline import Pipeline

    on_gpu = device == "cuda"
    pipeline = Pipeline(
        batch_size=batch, num_threads=threads, device_id=torch.cuda.current_device() if on_gpu else None, prefetch_queue_depth=2
    )
    with pipeline:
        encoded = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1)
        if not on_gpu:
            options = {name: value for name, value in options.items() if name != "hw_decoder_load"}
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, **options)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _decoded(encoded: list[np.ndarray], device: str, *, batch: int, **options) -> list[np.ndarray]:
    """Pixels of each image, (H, W, 3) uint8."""
    batches = [encoded[start : start + batch] for start in range(0, len(encoded), batch)]
    # DALI asks for more than is taken out, as it works ahead.
    pipeline = _pipeline(itertools.cycle(batches), batch, device, threads=4, **options)
    images: list[np.ndarray] = []
    for _ in batches:
        (tensors,) = pipeline.run()
        on_host = tensors.as_cpu() if device == "cuda" else tensors
        images += [np.array(on_host[i]) for i in range(len(on_host))]
    return images


class _Decoder:
    """Decoding alone, batch after batch of a shard set, at the speed that DALI reaches."""

    def __init__(self, reader, batch: int, device: str, *, threads: int):
        self.device, self.batch = device, batch
        self._pipeline = _pipeline(self._batches(reader), batch, device, threads)

    def _batches(self, reader) -> Iterator[list[np.ndarray]]:
        ids = np.arange(len(reader))
        for k in itertools.count():
            start = k * self.batch % (len(ids) - self.batch + 1)
            yield reader.read(ids[start : start + self.batch])

    def run(self, batches: int) -> float:
        """Patches per second."""
        _synchronize(self.device)
        started = time.perf_counter()
        for _ in range(batches):
            self._pipeline.run()
        _synchronize(self.device)
        return batches * self.batch / (time.perf_counter() - started)


def _as_420(encoded: np.ndarray) -> np.ndarray:
    """The image once more, as a JPEG with colour at half the resolution."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        image.convert("RGB").save(file, "JPEG", quality=85, subsampling=2)
    return np.frombuffer(file.getvalue(), np.uint8)


# ---- Views ----


def _first_views(reader, count: int, *, device: str, batch: int, recipe: str, size: int, threads: int, step: int = 0):
    """The first views of an epoch from that step on: (V, count, 3, S, S) on the CPU."""
    import torch

    from pipelines.loader import ViewLoader
    from pipelines.recipes import get_recipe

    views = ViewLoader(
        reader,
        np.arange(len(reader)),
        batch_size=batch,
        image_size=size,
        recipe=get_recipe(recipe),
        seed=SEED,
        device=device,
        drop_last=False,
        threads=threads,
    )
    views.load_state_dict({"epoch": 0, "step": step})
    parts, taken = [], 0
    for made in views:
        parts.append(made.views.cpu())
        taken += len(made.id)
        if taken >= count:
            break
    return torch.cat(parts, dim=1)[:, :count]


def _levels(views) -> np.ndarray:
    """Normalised views (V, B, 3, S, S) as levels of 255."""
    from pipelines.recipes import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (views.flatten(0, 1).numpy() * std + mean) * 255


def _colour_difference(s: Setting) -> Result:
    """The colour step of the device (torch) against that of the CPU (Numba) on identical pixels and draws."""
    import torch

    from pipelines.colour import colour_batch, colour_rows, colour_step
    from pipelines.recipes import get_recipe
    from pipelines.reference import decode as decode_by_pillow
    from pipelines.views import draw_views

    side, recipe = s.image_size, get_recipe("simclr")
    ids = np.arange(min(s.sample, len(s.reader)))
    pixels = [Image.fromarray(decode_by_pillow(e).permute(1, 2, 0).numpy()).resize((side, side)) for e in s.reader.read(ids)]
    images_BHWC = np.stack([np.asarray(image) for image in pixels])
    rows = colour_rows(draw_views(ids, seed=SEED, epoch=0, recipe=recipe, sizes=s.reader.sizes[ids]), recipe)[:, 0]
    rows = np.ascontiguousarray(rows)
    on_cpu = np.empty((len(ids), 3, side, side), np.float32)
    for out, image, row in zip(on_cpu, images_BHWC, rows, strict=True):
        colour_step(out, image, row)
    on_device = colour_batch(torch.from_numpy(images_BHWC).to(s.device), rows).cpu()
    return _difference(list(_levels(on_device[None])), list(_levels(torch.from_numpy(on_cpu)[None])))


def _difference(some: list[np.ndarray], others: list[np.ndarray]) -> Result:
    """Mean, 99.9th percentile and maximum of the absolute difference, and the share of values that differ by more than 1."""
    pairs = zip(some, others, strict=True)
    d = np.concatenate([np.abs(np.subtract(a, b, dtype=np.float32)).ravel() for a, b in pairs])
    return {
        "mean": round(float(d.mean()), 4),
        "p99_9": round(float(np.percentile(d, 99.9)), 3),
        "max": round(float(d.max()), 3),
        "share_above_1": round(float((d > 1).mean()), 6),
    }


def _bits(one, other) -> Result:
    """Whether two tensors of views are identical, and by how much not."""
    different = one != other
    if not bool(different.any()):
        return {"identical": True}
    differing = different.flatten(2).any(2).float().mean()  # per view and patch
    largest = float(np.abs(_levels(one) - _levels(other)).max())
    values = float(different.float().mean())
    return {"identical": False, "views": round(float(differing), 4), "values": round(values, 6), "max_levels": round(largest, 4)}


def _host_waits(views) -> Result:
    """Operations of torch that make the host wait for the device while a batch is made, by the line that asks for it.

    DALI's own waits do not show here. Each of these lets the device run dry, as the host cannot prepare the next step.
    """
    import torch

    views.load_state_dict({"epoch": 0, "step": 0})
    batches = iter(views)
    next(batches)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            next(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message).lower()]
    return {place: places.count(place) for place in sorted(set(places))}


# ---- The model ----


def _model_speed(s: Setting, *, compile: bool = False) -> Result:
    """Training steps on views that lie on the device, as `train.loop` takes them."""
    import torch

    from models.backbones import build_backbone
    from train.loop import ViewModel
    from train.methods import SimCLR
    from train.schedules import build_optimizer

    if s.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(SEED)
    method = SimCLR(PROJECTION_DIM, TEMPERATURE)
    backbone = build_backbone(s.backbone, s.image_size)
    net: Any = ViewModel(backbone, method.build_head(int(backbone.num_features))).to(s.device)  # type: ignore[arg-type]
    if s.device == "cuda":
        net = net.to(memory_format=torch.channels_last)
    optimizer = build_optimizer("lars", net, weight_decay=1e-6, fused=s.device == "cuda")
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    net.train()
    # In a dry run without its compiler, which takes minutes on a CPU.
    run = torch.compile(net, backend="eager" if s.dry else "inductor") if compile else net
    views_VBCSS = torch.randn(2, s.batch_size, 3, s.image_size, s.image_size, device=s.device)
    label_B = torch.full((s.batch_size,), -1, device=s.device)

    def steps(count):
        _synchronize(s.device)
        started = time.perf_counter()
        for _ in range(count):
            with torch.autocast(s.device, torch.bfloat16, enabled=not s.dry):
                loss = method.loss(run(views_VBCSS), label_B, None)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        _synchronize(s.device)
        return (time.perf_counter() - started) / count

    first = steps(1)
    steps(1 if s.dry else 5)
    guess = steps(1 if s.dry else 3)
    count = max(1, min(50, round((0.2 if s.dry else 2.5) / guess)))
    seconds = statistics.median(steps(count) for _ in range(3))
    found = {
        "img_per_s": round(2 * s.batch_size / seconds, 1),
        "steps_per_s": round(1 / seconds, 3),
        "ms_per_step": round(1000 * seconds, 2),
        "first_step_seconds": round(first, 2),
        "timed_steps": 3 * count,
    }
    if s.device == "cuda":
        found["torch_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        del net, run, backbone, optimizer, views_VBCSS
        torch.cuda.empty_cache()
    return found


def _synchronize(device: str) -> None:
    """Wait for all that was asked of the device, on every stream: DALI's too."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


# ---- Running them, and writing down ----


def _setting(config: Config, folder: Path, results: dict[str, Result]) -> Setting:
    import torch

    if not config.dry and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here: --dry runs the same code on the CPU")
    unknown = [name for name in config.steps if name not in STEPS]
    if unknown:
        raise ValueError(f"there is no step {unknown[0]!r}: choose of {', '.join(STEPS)}")
    if config.dry:
        torch.set_num_threads(1)  # on cores that others use too, threads that wait for each other are many times slower
    defaults: tuple[str, int, int, int, int] = ("test_resnet", 64, 8, 48, 12) if config.dry else ("resnet50", 224, 256, 4096, 64)
    backbone, image_size, batch_size, patches, sample = defaults
    return Setting(
        config=config,
        folder=folder,
        device="cpu" if config.dry else "cuda",
        image_size=config.image_size or image_size,
        batch_size=config.batch_size or batch_size,
        backbone=config.backbone or backbone,
        patches=config.patches or patches,
        sample=sample,
        deadline=time.monotonic() + config.seconds,
        results=results,
    )


def _run(s: Setting, record: Result, path: Path) -> list[str]:
    """Run the steps, writing after each. Returns the names of those that failed."""
    failed = []
    chosen = {"environment", *(s.config.steps or STEPS)}
    if chosen - set(NO_DATA):
        chosen.add("data")
    for name, (step, needed) in STEPS.items():
        if name not in chosen:
            continue
        if s.left < needed and not s.dry:
            record["steps"][name] = {"status": "skipped", "why": f"{s.left:.0f} s were left, and it may take {needed:.0f} s"}
            print(f"SKIPPED {name}: {record['steps'][name]['why']}", flush=True)
            _write(record, path)
            continue
        print(f"{name}: {(step.__doc__ or '').splitlines()[0]}", flush=True)
        record["steps"][name] = {"status": "running"}  # what stands there if the process is killed
        _write(record, path)
        started, result = time.monotonic(), s.results.setdefault(name, {})
        try:
            step(s, result)
        # The one place that catches everything: a GPU is lent for minutes, and what the other steps find out is worth
        # having when one of them fails, in whatever way. The error is kept, shown, and decides the exit code.
        except Exception as error:
            failed.append(name)
            result |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc().splitlines()}
            print(f"FAILED {name}: {result['error']}\n{traceback.format_exc()}", flush=True)
        status = "failed" if name in failed else "ok"
        record["steps"][name] = {"status": status, "step_seconds": round(time.monotonic() - started, 1)} | result
        _write(record, path)
        print(f"    {name}: {status} after {time.monotonic() - started:.1f} s", flush=True)
    return failed


def _write(record: Result, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _path(folder: Path, date: str, device: str) -> Path:
    """A new file's name: an earlier result is never overwritten."""
    for number in itertools.count(1):
        path = folder / f"{date}-gpu-check-{device}{'' if number == 1 else f'-{number}'}.json"
        if not path.exists():
            return path
    raise AssertionError


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:  # there is no git
        return "unknown"
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "") if found.returncode == 0 else "unknown"


def table(record: Result) -> str:
    """The figures as Markdown, a row each."""
    lines = [
        f"# GPU check, {record['date']}, {record['device']}",
        "",
        f"Commit {record['commit']}; `{record['command']}`"
        + ("; a dry run, so no figure means anything." if record["dry"] else "."),
        "",
        "| step | figure | value |",
        "| --- | --- | --- |",
    ]
    for step, result in record["steps"].items():
        shown = {name: value for name, value in result.items() if name not in ("traceback", "step_seconds", "status")}
        lines.append(f"| {step} | | {result['status']} ({result.get('step_seconds', 0)} s) |")
        for name, value in shown.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"| {step} | {name} | {' '.join(text.split()).replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    results: dict[str, Result] = {}
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    # A step that hangs, in DALI or in a driver, says where before it is ended.
    faulthandler.dump_traceback_later(config.seconds + (180 if config.dry else 20), exit=True)
    try:
        import torch

        s = _setting(config, folder, results)
        device = "cpu" if config.dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        date = time.strftime("%Y-%m-%d")
        path = _path(out, date, device)
        record: Result = {
            "date": date,
            "time": time.strftime("%H:%M:%S%z"),
            "device": device,
            "dry": config.dry,
            "commit": config.commit or _commit(),
            "command": " ".join(["python", *sys.argv]),
            "backbone": s.backbone,
            "image_size": s.image_size,
            "batch_size": s.batch_size,
            "steps": {},
        }
        failed = _run(s, record, path)
        path.with_suffix(".md").write_text(table(record), encoding="utf-8")
        print(f"\n{table(record)}\n{path}", flush=True)
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr, flush=True)
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="gpu_check.py", description=(__doc__ or "").splitlines()[0]))
