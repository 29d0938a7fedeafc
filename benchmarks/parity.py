"""How far are the views from torchvision's, operation by operation?

    python benchmarks/parity.py
    python benchmarks/parity.py --images data/breast data/kidney --patches 64

The graph of the CPU, and the graph of a GPU (DALI's resize, then the step in torch) run on the CPU, against torchvision in float
with the same draws; the last column says how far torchvision's own way with images, in whole levels, is from that. It writes a
table and its figures, and fails where a mean exceeds 1 level of 255 or a 99.9th percentile 4.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Result, check_at_least, script
from report import Record, Report, Table
from worker import ROOT

from pipelines.dali_graph import DaliGraph
from pipelines.recipes import RECIPES, ColourJitter, GaussianBlur, RandomCrop, Recipe, StainJitter
from pipelines.torchvision_reference import decode, reference_view, reference_views
from pipelines.views import draw_views
from sharding.cli import option
from sharding.drawn_patches.patches import draw_patch, encode
from sharding.process_pool import available_cores
from train.records.runs import versions

SEED = 42
MEAN, HIGH = 1.0, 4.0  # levels: what a mean and a 99.9th percentile may be at most
COLUMNS = {"graph": "CPU graph", "torch": "GPU path, on the CPU", "rounded": "torchvision in whole levels"}

# Each operation alone, always applied; where there is no crop, all of the patch is resized.
_WHOLE = Recipe(keep_aspect=False)
OPERATIONS = {
    "resize": _WHOLE,
    "crop and resize": Recipe(crop=RandomCrop()),
    "flip": dataclasses.replace(_WHOLE, flip=1.0),
    "vertical flip": dataclasses.replace(_WHOLE, vertical_flip=1.0),
    "quarter turns": dataclasses.replace(_WHOLE, turns="random"),
    "stain 0.05": dataclasses.replace(_WHOLE, stain=StainJitter(0.05)),
    "stain 0.2": dataclasses.replace(_WHOLE, stain=StainJitter(0.2)),
    "brightness 0.8": dataclasses.replace(_WHOLE, jitter=ColourJitter(0.8, 0, 0, 0, probability=1.0)),
    "contrast 0.8": dataclasses.replace(_WHOLE, jitter=ColourJitter(0, 0.8, 0, 0, probability=1.0)),
    "saturation 0.8": dataclasses.replace(_WHOLE, jitter=ColourJitter(0, 0, 0.8, 0, probability=1.0)),
    "hue 0.2": dataclasses.replace(_WHOLE, jitter=ColourJitter(0, 0, 0, 0.2, probability=1.0)),
    "all four": dataclasses.replace(_WHOLE, jitter=ColourJitter(0.8, 0.8, 0.8, 0.2, probability=1.0)),
    "grey": dataclasses.replace(_WHOLE, grey=1.0),
    "blur": dataclasses.replace(_WHOLE, blur=GaussianBlur(probability=1.0)),
}


@dataclass(frozen=True)
class Config:
    """What is compared on what."""

    images: list[str] = option([], "folders of real patches, searched through for JPEG and PNG files")
    patches: int = option(32, "how many patches of each folder, and how many drawn ones")
    image_size: int = option(224, "side of a view, pixels")
    out: str = option(str(ROOT / "benchmarks" / "results"), "where the table is written")


def real_patches(folder: str, count: int) -> list[np.ndarray]:
    """The bytes of so many images, evenly spread over all that lie under the folder. Raises ValueError where there are fewer."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < count:
        raise ValueError(f"{folder}: {len(files)} JPEG and PNG files lie there, fewer than --patches {count}")
    chosen = np.linspace(0, len(files) - 1, count).astype(int)
    return [np.frombuffer(files[i].read_bytes(), np.uint8) for i in chosen]


def drawn_patches(count: int, size: int) -> list[np.ndarray]:
    """The bytes of so many drawn patches, JPEG."""
    patches = (draw_patch("kidney", None, index=i, slide=i % 4, size=size, seed=SEED) for i in range(count))
    return [np.frombuffer(encode(patch), np.uint8) for patch in patches]


def compare(graphs: dict[str, DaliGraph], encoded: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean, 99.9th percentile and maximum of the difference to the reference in levels of 255, by column."""
    recipe, image_size = graphs["graph"].recipe, graphs["graph"].image_size
    images = [decode(one) for one in encoded]
    sizes = np.array([image.shape[-2:] for image in images])
    drawn = draw_views(np.arange(len(encoded)), seed=SEED, epoch=0, recipe=recipe, sizes=sizes)
    setting: dict[str, Any] = {"recipe": recipe, "image_size": image_size}
    reference = reference_views(encoded, drawn, **setting)
    found = {}
    for name, graph in graphs.items():
        graph.put(encoded, drawn)
        found[name] = graph.get()
    found["rounded"] = torch.stack(
        [
            torch.stack([reference_view(image, drawn, i, view, dtype=torch.uint8, **setting) for i, image in enumerate(images)])
            for view in range(recipe.views)
        ]
    )
    scale = 255 * torch.tensor(recipe.std).view(3, 1, 1)
    return {name: figures((views - reference) * scale) for name, views in found.items()}


def figures(difference: torch.Tensor) -> dict[str, float]:
    d = difference.abs().numpy().ravel()
    return {"mean": float(d.mean()), "p99_9": float(np.percentile(d, 99.9)), "max": float(d.max())}


def main(config: Config) -> None:
    torch.set_num_threads(1)
    check_at_least(config, patches=1, image_size=32)
    sources = {"drawn": drawn_patches(config.patches, config.image_size)}
    sources |= {Path(folder).absolute().name: real_patches(folder, config.patches) for folder in config.images}
    if len(sources) <= len(config.images):
        raise ValueError("--images: the table could not tell these apart; give folders of different names, and none named drawn")
    cases = OPERATIONS | {f"recipe {name}": recipe for name, recipe in RECIPES.items()}
    result = Result(config.out, "parity")
    rows: list[Record] = []
    result.record |= {"versions": versions(), "patches": config.patches, "image_size": config.image_size, "rows": rows}
    for name, recipe in cases.items():
        sizes: dict[str, Any] = {"batch_size": config.patches, "image_size": config.image_size, "threads": available_cores()}
        steps = {"graph": "numba", "torch": "torch"}
        graphs = {column: DaliGraph(recipe=recipe, device="cpu", step=step, **sizes) for column, step in steps.items()}
        for source, encoded in sources.items():
            row = {"case": name, "source": source} | compare(graphs, encoded)
            rows.append(row)
            result.say(" | ".join(_cells(row)))
    # What is no number is too far, too
    result.record["too_far"] = [
        f"{COLUMNS[column]}: {row['case']} on {row['source']}"
        for row in rows
        for column in ("graph", "torch")
        if not (row[column]["mean"] <= MEAN and row[column]["p99_9"] <= HIGH)
    ]
    result.finish(report_of(result.record), show=[])
    if result.record["too_far"]:
        print(f"TOO FAR: {'; '.join(result.record['too_far'])}", file=sys.stderr)
        raise SystemExit(1)


def _cells(row: Record) -> list[str]:
    cells = (f"{row[column]['mean']:.4f} / {row[column]['p99_9']:.3f} / {row[column]['max']:.2f}" for column in COLUMNS)
    return [row["case"], row["source"], *cells]


def report_of(record: Record) -> Report:
    text = (
        "Mean / 99.9th percentile / maximum of the difference to torchvision in float, in levels of 255, with the same draws,"
        f" over {record['patches']} patches of each source, at {record['image_size']} px."
    )
    table = Table(["operation", "patches", *COLUMNS.values()], [_cells(row) for row in record["rows"]])
    end = f"More than {MEAN:g} in the mean or {HIGH:g} at the 99.9th percentile: {'; '.join(record['too_far']) or 'none'}."
    return Report(record, "Parity with torchvision", [text, table, end])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
