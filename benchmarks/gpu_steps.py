"""The steps of the GPU check. Each puts plain data into `found` as it goes, so that what it found before it failed is kept."""

import dataclasses
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import step as contenders
from contenders.step import fresh_memory
from gpu_pixels import (
    SEED,
    by_pillow,
    colour_difference,
    decode_pipeline,
    decoded,
    decoders,
    difference,
    encoded_batches,
    first_views,
    identity,
    levels,
    with_halved_colour,
)
from harness import set_of
from worker import synchronize

from pipelines.loader import ViewLoader
from pipelines.recipes import get_recipe
from pipelines.shard_reader import ShardReader
from sharding.drawn_patches.dataset import LAYOUTS, DrawConfig, draw_set
from sharding.packing import build_shards
from sharding.process_pool import available_cores
from train.records.runs import versions

Result = dict[str, Any]

_ORGAN = "kidney"  # unlabelled, and the quicker one to draw


@dataclasses.dataclass
class Setting:
    """What the steps share."""

    folder: Path  # temporary
    device: str
    dry: bool
    data: str | None  # a shard set to use instead of drawn patches
    backbone: str
    image_size: int
    batch_size: int
    patches: int
    sample: int  # patches whose pixels are compared
    deadline: float
    sets: dict[str, ShardReader] = dataclasses.field(default_factory=dict)
    model_alone: float | None = None  # img/s

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def reader(self, name: str = "stored") -> ShardReader:
        """Of the patches as they are stored, or of the sample as "png", which is decoded on the CPU everywhere."""
        if name not in self.sets:
            raise RuntimeError("there is no data: the step 'data' failed")
        return self.sets[name]

    def encoded_sample(self) -> list[np.ndarray]:
        """The stored bytes of the patches whose pixels are compared."""
        return self.reader().read(np.arange(min(self.sample, len(self.reader()))))


def environment(s: Setting, found: Result) -> None:
    """What this was measured on."""
    found |= {
        "machine": platform.platform(),
        "cores": available_cores(),
        "versions": versions(),
        "cuda": torch.version.cuda,
    }
    if s.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["driver, clock, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()


def data(s: Setting, found: Result) -> None:
    """Draw patches and pack them, or take the set that was given; and a sample of it as PNG."""
    cores = available_cores()
    stored = Path(s.data) if s.data is not None else s.folder / "shards"
    if s.data is None:
        started = time.monotonic()
        drawn = draw_set(DrawConfig(str(s.folder / "drawn"), _ORGAN, s.patches, s.image_size, seed=SEED, workers=cores))
        found["draw_seconds"] = round(time.monotonic() - started, 1)
        build_shards([drawn], stored, layout=LAYOUTS[_ORGAN], unlabelled=True, workers=cores, seed=SEED)
        found["draw_and_build_seconds"] = round(time.monotonic() - started, 1)
    reader = s.sets["stored"] = ShardReader(stored)
    found |= {
        "set": set_of(stored),
        "patches": len(reader),
        "mean_kilobytes": round(float(reader.manifest["size"].to_numpy().mean()) / 1e3, 1),
        "side": reader.sizes[0].tolist(),
    }
    (s.folder / "png").mkdir()
    for i, encoded in enumerate(s.encoded_sample()):
        by_pillow(encoded).save(s.folder / "png" / f"{i:06d}.png")
    build_shards([s.folder / "png"], s.folder / "png_shards", unlabelled=True, workers=1, seed=SEED)
    s.sets["png"] = ShardReader(s.folder / "png_shards")


def decode(s: Setting, found: Result) -> None:
    """Decoding on the device against DALI's own on the CPU, in levels of 255, and whether it depends on the batch.

    Also for JPEGs with halved colour resolution (4:2:0), the usual kind, where the way of enlarging colour matters.
    """
    stored = s.encoded_sample()
    kinds = {"as stored": stored, "4:2:0": [with_halved_colour(encoded) for encoded in stored]}
    for (kind, encoded), (name, decoder) in itertools.product(kinds.items(), decoders(s.device).items()):
        on_cpu = decoded(encoded, len(encoded), {"device": "cpu"})
        one, other = (decoded(encoded, batch_size, decoder) for batch_size in (len(encoded), max(1, len(encoded) * 3 // 8)))
        same = difference(one, other)["max"] == 0
        note(found, f"{kind}, {name}", difference(one, on_cpu) | {"same_in_other_batch": same})


def views(s: Setting, found: Result) -> None:
    """Views on the device against those on the CPU from the same draws, in levels of 255, part by part."""
    side = s.image_size
    parts: list[tuple[str, str, str, int]] = [
        ("resize alone, down", "png", "eval-plain", side * 5 // 7),
        ("resize alone, up", "png", "eval-plain", side * 9 // 7),
        ("simclr, as stored", "stored", "simclr", side),
    ]
    for name, kind, recipe, size in parts:
        reader = s.reader(kind)
        count = min(s.sample, len(reader))
        on_device, on_cpu = (
            first_views(reader, count, recipe=recipe, size=size, device=device, batch_size=min(32, count), threads=2)
            for device in (s.device, "cpu")
        )
        note(found, name, difference(levels(on_device), levels(on_cpu)))
    note(found, "colour alone", colour_difference(s.encoded_sample(), side, s.device))


def purity(s: Setting, found: Result) -> None:
    """Whether views on the device are the same, bit for bit, in another batch, with other threads, and after a restart."""
    count, batch_size = (12, 8) if s.dry else (128, 32)
    kinds = {"resize, PNG": ("png", "eval-plain"), "simclr, as stored": ("stored", "simclr")}
    for name, (kind, recipe) in kinds.items():
        reader = s.reader(kind)
        n = min(count, len(reader))
        common: Result = {"recipe": recipe, "size": s.image_size, "device": s.device}
        usual: Result = common | {"batch_size": batch_size, "threads": 4}
        first = first_views(reader, n, **usual)
        other = first_views(reader, n, batch_size=batch_size * 3 // 4, threads=1, **common)
        note(found, f"{name}: again", identity(first, first_views(reader, n, **usual)))
        note(found, f"{name}: other batch and threads", identity(first, other))
        if n > batch_size:  # otherwise there is no middle to restart in
            rest = first_views(reader, n - batch_size, step=1, **usual)
            note(found, f"{name}: restart", identity(first[:, batch_size:], rest))
    found["all_identical"] = all(result["identical"] for result in found.values())


def _task(s: Setting, shards: str, seconds: float, steps: int) -> contenders.Task:
    sizes: Result = {"backbone": s.backbone, "image_size": s.image_size, "batch_size": s.batch_size}
    bf16 = not s.dry  # few CPUs know it
    cores = available_cores()
    return contenders.Task(
        shards, "", str(s.folder), **sizes, device=s.device, bf16=bf16, cores=cores, seconds=seconds, steps=steps, compile=False
    )


def model(s: Setting, found: Result) -> None:
    """The model alone: training steps as the loop takes them, on views that lie on the device."""
    run = contenders.model(_task(s, "", 0.2 if s.dry else 7.5, 0))
    s.model_alone = run["img_per_s"]
    ms = 1000 * run["seconds"] / run["steps"]
    found |= {"img_per_s": round(run["img_per_s"], 1), "ms_per_step": round(ms, 2), "timed_steps": run["steps"]}
    found |= _peak_memory(s.device)


def loader(s: Setting, found: Result) -> None:
    """The loader alone, and decoding alone, for several thread counts: medians over interleaved repetitions of an epoch."""
    fresh_memory(s.device)  # what the model leaves in torch's cache is out of DALI's reach
    cores, reader = available_cores(), s.reader()
    counts = [1] if s.dry else [t for t in (4, 8, 16) if t <= cores] or [cores]
    ids, batch_size = np.arange(len(reader)), min(s.batch_size, len(reader))
    steps = len(ids) // batch_size
    common: Result = {"image_size": s.image_size, "recipe": get_recipe("simclr"), "seed": SEED, "device": s.device}
    decoder = decoders(s.device)["as the loader"]
    loaders, pipelines = {}, {}
    for t in counts:
        loaders[t] = ViewLoader(reader, ids, batch_size=batch_size, threads=t, **common)
        pipelines[t] = decode_pipeline(encoded_batches(reader, batch_size), batch_size, threads=t, decoder=decoder)
        for _ in itertools.islice(loaders[t], 3):  # warm-up: kernels are loaded, buffers grow
            pipelines[t].run()
    loaded: dict[int, list[float]] = {t: [] for t in counts}  # patches per second
    decoded_alone: dict[int, list[float]] = {t: [] for t in counts}
    ends = time.monotonic() + min(30.0, s.left - 60)
    for repetition in range(2 if s.dry else 5):
        if repetition and time.monotonic() > ends:
            break
        for t, pipeline in pipelines.items():
            loaders[t].load_state_dict({"epoch": repetition + 1, "step": 0})
            loaded[t].append(steps * batch_size / _seconds(s.device, loaders[t]))
            decoding = (pipeline.run() for _ in range(steps))
            decoded_alone[t].append(steps * batch_size / _seconds(s.device, decoding))
    found |= {"batch_size": batch_size, "batches": steps}
    for t in counts:
        rate, decode_rate = statistics.median(loaded[t]), statistics.median(decoded_alone[t])
        figures: Result = {
            "patches_per_s": round(rate, 1),
            "decode_patches_per_s": round(decode_rate, 1),
            "loader_to_decode": round(rate / decode_rate, 3),
            "repetitions": [round(r, 1) for r in loaded[t]],
            "decode_repetitions": [round(r, 1) for r in decoded_alone[t]],
        }
        note(found, f"{t} threads", figures)


def joint(s: Setting, found: Result) -> None:
    """Pretraining by the project's own stage, loader and model together, for some hundred steps in bf16."""
    fresh_memory(s.device)
    started = time.monotonic()
    batch_size = min(s.batch_size, len(s.reader()))
    # Half as fast as the model alone must still fit, with time to begin and end.
    speed = s.model_alone / (2 * batch_size) if s.model_alone else 3.0
    steps = 6 if s.dry else max(20, min(300, round(min(60.0, s.left - 40) * speed * 0.5)))
    task = dataclasses.replace(_task(s, str(s.reader().folder), 0.0, steps), batch_size=batch_size)
    run = contenders.pretrained(task, workers=0)
    found |= {
        "steps": run["steps"],
        "batch_size": batch_size,
        "seconds": round(time.monotonic() - started, 1),
        "patches_per_s": round(run["img_per_s"] / 2, 1),
        "img_per_s": round(run["img_per_s"], 1),
        "data_wait": round(run["data_wait"], 4),
        "loss_first": round(run["loss_first"], 4),
        "loss_last": round(run["loss_last"], 4),
        "loss_of_chance": round(float(np.log(2 * batch_size - 1)), 4),
    }
    found |= _peak_memory(s.device)
    if s.model_alone:
        found["joint_to_model"] = round(run["img_per_s"] / s.model_alone, 3)


def note(found: Result, name: str, value: Any) -> None:
    found[name] = value
    print(f"    {name}: {value}", flush=True)


def _seconds(device: str, work: Iterable) -> float:
    """The time it takes to go through it, to the end of all that was asked of the device on any stream: DALI's too."""
    synchronize(device)
    started = time.perf_counter()
    for _ in work:
        pass
    synchronize(device)
    return time.perf_counter() - started


def _peak_memory(device: str) -> Result:
    if device != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "torch_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "device_in_use_gib": round((total - free) / 2**30, 2),  # DALI's memory and torch's cache too
    }
