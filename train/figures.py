"""The report's figures, as SVG text or PNG bytes."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pipelines.preview import view_sheet
from pipelines.recipes import get_recipe
from train.inputs import open_set

# Told apart in print and by colour-blind readers (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are text, also with two dollar signs in them
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


_PAIRS = 6
_READABLE = 192  # pixels: what the captions need


def curves(metrics: dict[str, list[dict[str, Any]]], name: str, title: str, *, logarithmic: bool = False) -> str:
    """A metric over steps, a line per run. metrics: rows of metrics.jsonl by the run's name."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for colour, (run, rows) in zip(_cycle(len(metrics)), metrics.items(), strict=True):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            marker = "." if len(points) < 3 else None
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, linewidth=1.4, label=run, marker=marker)
        axes.set_xlabel("step")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        if logarithmic:
            axes.set_yscale("log")
        if len(metrics) > 1:
            axes.legend(frameon=False, fontsize=8)
        return _svg(figure)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> str:
    """Rows are the truth; shade is the share of the row, the number is the count."""
    counts = np.asarray(matrix)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 1.5 + 0.55 * len(classes)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(counts.shape):
            ink = "white" if share[row, column] > 0.55 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=ink, fontsize=9)
        axes.set_xticks(range(len(classes)), classes, rotation=35, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(title, loc="left", fontsize=9)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return _svg(figure)


def pairs(data: str, *, recipe: str, image_size: int, seed: int, cache_bytes: int | None = None) -> bytes:
    """PNG of augmented pairs as training sees them, in its first epoch. cache_bytes: see inputs.Input."""
    with open_set(data, cache_bytes) as reader:
        ids = np.arange(min(_PAIRS, len(reader)))
        sheet = view_sheet(reader, ids, recipe=get_recipe(recipe), image_size=max(_READABLE, image_size), seed=seed, columns=2)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _cycle(count):
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Text stays text in the SVG, so the reader's browser has the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
