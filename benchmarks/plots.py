"""Plots of the other benchmarks' results: FILE.png beside each FILE.json.

    python benchmarks/plots.py benchmarks/results/2026-11-23-loader.json

A bar is the median over rounds, each of which is a dot on it; ours are in colour. What failed or was not started has no bar: the
tables name it with its reason.
"""

import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from contenders.equal_work import PRETRAINED
from contenders.heads import CONTENDERS as HEADS
from contenders.heads import SCENARIOS
from contenders.ntxent import CONTENDERS as LOSSES
from contenders.packing import CONTENDERS as PACKERS
from contenders.smoke import RATIOS
from contenders.step import CONTENDERS as STEPS
from harness import script
from loader import ALL as LOADERS
from report import Record
from smoke import FALL
from starting import CONTENDERS as STARTS
from starting import PARTS

from sharding.cli import positional
from train.records.runs import read_json

_OURS, _OTHERS = "#2f6f9f", "#b9b9b9"
_LINES = ("#8a8a8a", "#d08a2e", "#4f9d57", "#a05195")  # of others


class Bar(NamedTuple):
    """values: one for each round."""

    label: str
    values: list[float]
    ours: bool


class Bars(NamedTuple):
    title: str
    unit: str
    bars: list[Bar]


class Lines(NamedTuple):
    """lines: points by name. powers: whether both axes grow by powers."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    powers: bool


@dataclass(frozen=True)
class Config:
    """Which results are drawn."""

    files: list[str] = positional("JSON files of results")


def main(config: Config) -> None:
    paths = list(map(Path, config.files))
    if strange := next((path for path in paths if kind_of(path) not in PANELS), None):
        raise ValueError(f"{strange}: no plot for this kind of result; there are plots of {', '.join(PANELS)}")
    for path in paths:
        record = read_json(path, "give a result of a benchmark")
        plot = path.with_suffix(".png")
        draw(list(PANELS[kind_of(path)](record)), f"{record['date']}, {record['machine']['cores']} cores", plot)
        print(plot)


def kind_of(path: Path) -> str:
    """2026-11-23-step-cpu-2.json is of the kind step-cpu."""
    return re.sub(r"^\d{4}-\d\d-\d\d-|-\d+$", "", path.stem)


# ---- What is shown of each kind ----


def rates(record: Record, unit: str, title: str, contenders: Mapping[str, Any]) -> Iterator[Bars]:
    """Of a benchmark whose runs have that figure."""
    key = {"patches/s": "patches_per_s", "img/s": "img_per_s"}[unit]
    runs = {name: found for name, found in record["runs"].items() if name in contenders and found}
    bars = [Bar(contenders[name].title, [run[key] for run in found], is_ours(name)) for name, found in runs.items()]
    yield Bars(title, unit, bars)


def is_ours(name: str) -> bool:
    """Of step's contenders also those that have no other's in them."""
    return name.partition("-")[0] in ("ours", "model", "joint", "ray")


def packing(record: Record) -> Iterator[Bars]:
    patches, size = record["images"]["patches"], record["images"]["bytes"]
    title = f"Packing {patches:,} images of {size / patches / 1e3:.1f} KB, and merely decoding them"
    yield from rates(record, "patches/s", title, PACKERS)


def loader(record: Record) -> Iterator[Bars]:
    timed = record["timed"]
    title = f"Loading: two views of {timed['image_size']} px, batch {timed['batch_size']}"
    yield from rates(record, "patches/s", title, LOADERS)


def step(record: Record) -> Iterator[Bars]:
    t = record["timed"]
    title = f"A training step: {t['backbone']} at {t['image_size']} px, batch {t['batch_size']}, {t['device']}"
    shown = {name: contender for name, contender in STEPS.items() if name != "loader"}
    yield from rates(record, "img/s", title, shown)


def loss(record: Record) -> Iterator[Lines]:
    for value, scale, title, unit in (
        ("seconds", 1e3, "NT-Xent, forward and backward: time", "ms"),
        ("peak_bytes", 1 / 2**20, "NT-Xent: memory beyond the embeddings", "MiB"),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for anchors, found in record["summary"].items():
            for name, row in found.items():
                points = lines.setdefault(LOSSES[name].title, [])
                points.append((int(anchors), row[value] * scale))
        yield Lines(title, "anchors, 2N", unit, lines, powers=True)


def linear(record: Record) -> Iterator[Bars]:
    for scenario, runs in record["runs"].items():
        bars = [Bar(HEADS[name].title, [run["seconds"] for run in found], name == "ours") for name, found in runs.items()]
        yield Bars(f"Linear heads: {SCENARIOS[scenario]}", "s", [bar for bar in bars if bar.values])


def ratios(record: Record) -> Iterator[Bars]:
    """Each run's ratio as a share of the median, so that all fit one axis."""
    bars = []
    for name in RATIOS:
        values = [run[name]["ratio"] for run in record["runs"] if name in run]
        if values:
            middle = statistics.median(values)
            bars.append(Bar(name, [value / middle for value in values], True))
    yield Bars("What a regression is judged by: each run's ratio, as a share of the median", f"(fails below {1 - FALL:g})", bars)


def starts(record: Record) -> Iterator[Bars]:
    for part, title in PARTS.items():
        bars = []
        for name, (words, _) in STARTS.items():
            if values := [found[part] for found in record["rounds"][name]]:
                bars.append(Bar(words, values, True))
        yield Bars(f"Starting: {title}", "s", bars)


def curves(record: Record) -> Iterator[Lines]:
    """The mean loss of each epoch, averaged over the seeds."""
    lines = {}
    for name, runs in record["runs"].items():
        if found := [run["curve"] for run in runs if "curve" in run]:
            means = map(statistics.fmean, zip(*found, strict=True))
            lines[PRETRAINED[name].title] = [(float(epoch), loss) for epoch, loss in enumerate(means, start=1)]
    seeds = len(record["settings"]["seeds"])
    yield Lines(f"SimCLR at equal work: loss, mean over {seeds} seeds", "epoch", "NT-Xent, nats", lines, powers=False)


# By the kind of a result, as its file's name tells it.
PANELS: dict[str, Callable[[Record], Iterator[Bars | Lines]]] = {
    "packing": packing,
    "loader": loader,
    "loader-cuda": loader,
    "step-cpu": step,
    "step-cuda": step,
    "ntxent-cpu": loss,
    "ntxent-cuda": loss,
    "heads": linear,
    "equal-work": curves,
    "smoke": ratios,
    "starting": starts,
}


# ---- Drawing ----


def draw(panels: list[Bars | Lines], foot: str, path: Path) -> None:
    from matplotlib.figure import Figure

    beside = isinstance(panels[0], Lines)  # bars have long names, and stand one above the other
    rows = [1.0] if beside else [0.9 + 0.27 * len(panel.bars) for panel in panels if isinstance(panel, Bars)]
    size = (max(6.6, 5.0 * len(panels)), 3.8) if beside else (8.2, sum(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = {"ncols": len(panels)} if beside else {"nrows": len(panels), "height_ratios": rows}
    for axes, panel in zip(figure.subplots(squeeze=False, **grid).flat, panels, strict=True):
        axes.set_title(panel.title, fontsize=9, loc="left")
        if isinstance(panel, Lines):
            _draw_lines(axes, panel)
        else:
            _draw_bars(axes, panel)
        axes.tick_params(labelsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(foot, fontsize=7, ha="right", x=0.99, color="#666666")
    figure.savefig(path, dpi=110)


def _draw_bars(axes: Any, panel: Bars) -> None:
    for number, bar in enumerate(panel.bars):
        middle = statistics.median(bar.values)
        axes.barh(number, middle, height=0.66, color=_OURS if bar.ours else _OTHERS)
        axes.plot(bar.values, [number] * len(bar.values), ".", color="black", markersize=3)
        shown = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
        axes.annotate(shown, (max(bar.values), number), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
    axes.invert_yaxis()
    axes.margins(x=0.09)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel(panel.unit, fontsize=7.5)


def _draw_lines(axes: Any, panel: Lines) -> None:
    colours = iter(_LINES)
    for name, points in panel.lines.items():
        ours = name.startswith("ours")
        colour, width = (_OURS, 2.2) if ours else (next(colours), 1.2)
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=width, color=colour, label=name)
    x = sorted({point[0] for points in panel.lines.values() for point in points})
    axes.set(xlabel=panel.x, ylabel=panel.y)
    if panel.powers:
        axes.set(xscale="log", yscale="log")
    axes.set_xticks(x, [f"{value:,.0f}" for value in x], rotation=30 if panel.powers else 0)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right" if panel.powers else "upper right")


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
