"""The plots and images of a report, as SVG text or JPEG bytes.

An SVG is part of the page and takes the page's text colour, so that it is readable on white paper and on a dark screen. It has no
title and no legend: the page has them as text, which wraps and uses the reader's fonts.
"""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipelines.loader import ViewLoader
from pipelines.recipes import get_recipe
from pipelines.torchvision_reference import decode
from pipelines.view_sheet import describe_patch, describe_view, view_pixels
from train.records.data import open_set
from train.scoring.metrics import BINS

# Distinguishable in print and by colour-blind readers (Okabe and Ito 2008, without black, which a dark screen does not show).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
# Where colours repeat, the line style or the mark differs.
DASHES = ("solid", "dashed", "dotted")
MARKS = ("o", "s", "^", "D")
# More than COLOURS, for slides, and not all easy to distinguish (d3's category20, Bostock et al. 2011).
_TAB20 = [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps["tab20"].colors]  # type: ignore[attr-defined]
MANY_COLOURS = (*_TAB20[::2], *_TAB20[1::2])  # the strong ones first

# Placeholders that are replaced by the colours of the page.
_INK, _GRID = "#010203", "#040506"
_PAGE_COLOURS = {_INK: "currentColor", _GRID: "var(--line, #dddddd)"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "patchclr",  # equal plots, equal bytes
    "text.parse_math": False,  # names are text, also with two dollar signs in them
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "savefig.transparent": True,
    "savefig.dpi": 160,  # of rasterised points on a map
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_SIZE = (4.6, 2.7)  # inches

_PAIRS = 6
_READABLE = 192  # pixels: smaller views are shown at this size


class Line(NamedTuple):
    """x, y: the points; number: the run's place in the report, which decides colour and dashes; low, high: the ends of an
    interval at each point, if known."""

    number: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Picture(NamedTuple):
    """jpeg: its bytes; caption: the text below it, line by line."""

    jpeg: bytes
    caption: str


def line_style(number: int) -> tuple[str, str]:
    """Colour and dashes of the run at that place of the report."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def class_style(number: int) -> tuple[str, str]:
    """Colour and mark of a class on a map."""
    return COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]


def curves(lines: Sequence[Line]) -> str:
    """A metric over steps, a line per run."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("step")
        for line in lines:
            colour, dashes = line_style(line.number)
            marker = "." if len(line.x) < 3 else None
            axes.plot(line.x, line.y, color=colour, linestyle=dashes, linewidth=1.4, marker=marker)
        return _svg(figure)


def over_fractions(lines: Sequence[Line]) -> str:
    """A metric over the share of labels (x, 0 to 1), with its intervals, a line per run."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("share of the training labels")
        shares = sorted({share for line in lines for share in line.x})
        for line in lines:
            colour, dashes = line_style(line.number)
            # Side by side, so that intervals do not hide each other.
            beside = [share * 1.02 ** (line.number - (len(lines) - 1) / 2) for share in line.x]
            axes.plot(beside, line.y, color=colour, linestyle=dashes, linewidth=1.4, marker="o", markersize=4)
            if line.low is not None and line.high is not None:
                axes.vlines(beside, line.low, line.high, color=colour, linewidth=1.4, alpha=0.55)
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{share:.3g}" if share < 0.01 else f"{share:.0%}" for share in shares])
        axes.minorticks_off()
        return _svg(figure)


def reliability(confidence: np.ndarray, right: np.ndarray) -> str:
    """A reliability diagram: the accuracy of n predictions (y) by their confidence (x), in 15 bins of equal width.

    confidence: (n,) probability of the predicted class; right: (n,) bool. Grey bars: each bin's share of the predictions.
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # (0, 1/15], (1/15, 2/15], ...
    counts = np.bincount(bins, minlength=BINS)
    used = counts > 0
    mean, share = (np.bincount(bins, values, BINS)[used] / counts[used] for values in (confidence, right))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("probability of the predicted class", size=(3.3, 3.0))
        axes.bar((np.arange(BINS) + 0.5) / BINS, counts / counts.sum(), 0.9 / BINS, color=_GRID)
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle="dashed")
        axes.plot(mean, share, color=COLOURS[0], linewidth=1.4, marker="o", markersize=4)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("accuracy")
        return _svg(figure)


def scatter(x: np.ndarray, y: np.ndarray, groups: Sequence[tuple[np.ndarray, str, str]]) -> str:
    """Points on a map. groups: for each, (n,) bool which points are of it, their colour and their mark."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 4.2), layout="constrained")
        axes = figure.subplots()
        size = min(max(6000 / max(len(x), 1), 8), 24)  # of a mark, in square points
        for chosen, colour, mark in groups:
            # As pixels: 2,000 vector points would make up most of the file.
            axes.scatter(x[chosen], y[chosen], s=size, c=colour, marker=mark, alpha=0.75, linewidths=0, rasterized=True)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        axes.spines[:].set_color(_GRID)
        return _svg(figure)


def pairs(data: str, *, recipe: str, image_size: int, seed: int, cache_bytes: int | None = None) -> list[list[Picture]]:
    """A few patches, each with its views beside it as training sees them in its first epoch. cache_bytes: see inputs.Input."""
    wanted, shown = get_recipe(recipe), max(_READABLE, image_size)
    with open_set(data, cache_bytes) as reader:
        ids = np.arange(min(_PAIRS, len(reader)))
        with ViewLoader(reader, ids, batch_size=len(ids), image_size=shown, recipe=wanted, seed=seed, shuffle=False) as loader:
            views_VBHWC = view_pixels(next(iter(loader)).views, wanted)
            parameters = loader.parameters(ids)
        found = []
        for i, encoded in enumerate(reader.read(ids)):
            patch = Picture(_jpeg(Image.fromarray(decode(encoded).permute(1, 2, 0).numpy())), describe_patch(reader, i, 0))
            views = [
                Picture(_jpeg(Image.fromarray(views_VBHWC[view, i])), describe_view(parameters, i, view))
                for view in range(wanted.views)
            ]
            found.append([patch, *views])
        return found


def _axes(xlabel, size=_SIZE):
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, optimize=True)
    return buffer.getvalue()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Text stays text in the SVG, so the browser supplies letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for drawn, shown in _PAGE_COLOURS.items():
        text = text.replace(drawn, shown)
    # A style sheet in the SVG would apply to the whole page, and ids must be unique in it: remove what nothing refers to.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    referred = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", text)
