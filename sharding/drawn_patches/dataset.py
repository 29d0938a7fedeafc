"""A folder of synthetic patches, and its settings."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sharding.cli import option, required
from sharding.drawn_patches.patches import ORGANS, draw_patch, encode, patch_classes, slide_name
from sharding.process_pool import ProcessPool, report_progress

LAYOUTS = {"breast": "{class}/{slide}/{name}", "kidney": "{slide}/{name}"}

_MARKER = ".synthetic.json"  # hidden, so that no layout takes it for a patch
_VERSION = 1  # of the drawing: raise it when the same arguments give other patches
_PATCHES_PER_TASK = 32


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """What is drawn, and where to."""

    out: str = required("the output folder")
    organ: str = option("breast", "breast (three classes) or kidney (no labels)")
    patches: int = option(1200, "number of patches")
    size: int = option(96, "side of a patch in pixels, 32 to 1024; nuclei are 7 to 15 px at any size")
    slides: int = option(12, "number of slides, each with its own stain")
    seed: int = option(7, "random seed; the same arguments give the same bytes")
    workers: int = option(2, "number of processes; does not affect the patches")


def draw_set(config: DrawConfig) -> Path:
    """Draw a set of patches into a folder, which appears whole or not at all. Returns the folder.

    A folder that holds the same set is left as it is. Raises ValueError when an argument is out of its range, and when the
    folder exists with anything else in it.
    """
    _check(config)
    out = Path(config.out)
    arguments = {"version": _VERSION} | {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "workers")}
    if out.exists():
        if _read_marker(out) != arguments:
            raise ValueError(f"{out} exists and holds something else: give another --out, or remove it first")
        return out
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        indices, draw = range(config.patches), functools.partial(_draw_files, config, partial)
        tasks = [indices[start : start + _PATCHES_PER_TASK] for start in indices[::_PATCHES_PER_TASK]]
        with ProcessPool(config.workers) as pool:
            for _ in pool.map(draw, tasks, total=config.patches, title=f"drawing {config.organ}"):
                pass
        (partial / _MARKER).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _draw_files(config, folder, indices: Sequence[int]) -> None:
    classes = patch_classes(config.patches, config.seed) if config.organ == "breast" else None
    for index in indices:
        slide, kind = index % config.slides, classes[index] if classes else None
        parts = ([kind] if kind else []) + [slide_name(config.organ, slide), f"p{index:06d}.jpg"]
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw_patch(config.organ, kind, index=index, slide=slide, size=config.size, seed=config.seed)))
        report_progress(1)


def _read_marker(folder):
    try:
        return json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check(config):
    if config.organ not in ORGANS:
        raise ValueError(f"organ {config.organ!r} is not known: breast (three classes) or kidney (no labels)")
    for name, low, high in (("patches", 1, 10**7), ("size", 32, 1024), ("slides", 1, 10**4), ("workers", 1, 256)):
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name} {getattr(config, name)} is out of range: give {low} to {high}")
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"seed {config.seed} is out of range: give a whole number from 0 to 2**64 - 1")
