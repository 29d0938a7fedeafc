"""Plots of results: FILE.png beside each FILE.json of loader.py, ntxent.py, equal_work.py or scale.py.

    python benchmarks/plots.py benchmarks/results/2026-11-23-loader.json

A bar is the median over rounds, each of which is a dot on it; ours are in colour. What failed or was not started has no bar: the
tables name it with its reason.
"""

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders.equal_work import PRETRAINED
from harness import script
from loader import ALL as LOADERS
from ntxent import CONTENDERS as LOSSES
from report import Record

from sharding.cli import positional
from train.records.runs import read_json

_OURS, _OTHERS = "#2f6f9f", "#b9b9b9"
_LINES = ("#8a8a8a", "#d08a2e", "#4f9d57", "#a05195")  # of others
Points = Iterable[tuple[float, float]]


@dataclass(frozen=True)
class Config:
    """Which results are drawn."""

    files: list[str] = positional("JSON files of results")


def main(config: Config) -> None:
    paths = list(map(Path, config.files))
    if strange := next((path for path in paths if kind_of(path) not in PLOTS), None):
        raise ValueError(f"{strange}: no plot for this kind of result; there are plots of {', '.join(PLOTS)}")
    for path in paths:
        record = read_json(path, "give a result of a benchmark")
        figure = PLOTS[kind_of(path)](record)
        foot = f"{record['date']}, {record['machine']['cores']} cores"
        figure.supxlabel(foot, fontsize=7, ha="right", x=0.99, color="#666666")
        figure.savefig(path.with_suffix(".png"), dpi=110)
        print(path.with_suffix(".png"))


def kind_of(path: Path) -> str:
    """2026-11-23-step-cpu-2.json is of the kind step-cpu."""
    return re.sub(r"^\d{4}-\d\d-\d\d-|-\d+$", "", path.stem)


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.6, width * count), height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for each in axes:
        each.tick_params(labelsize=7.5)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def loader(record: Record) -> Any:
    """A bar for each contender."""
    timed, runs = record["timed"], {name: runs for name, runs in record["runs"].items() if name in LOADERS and runs}
    figure, (axes,) = _panels(1, 8.2, 0.9 + 0.27 * len(runs))
    for number, (name, found) in enumerate(runs.items()):
        rates = [run["patches_per_s"] for run in found]
        axes.barh(number, statistics.median(rates), height=0.66, color=_OURS if name.startswith("ours") else _OTHERS)
        axes.plot(rates, [number] * len(rates), ".", color="black", markersize=3)
        place: Record = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(f"{statistics.median(rates):,.0f}", (max(rates), number), **place)
    axes.set_yticks(range(len(runs)), [LOADERS[name].title for name in runs])
    axes.invert_yaxis()
    axes.margins(x=0.09)
    axes.set_xlim(left=0)
    axes.set_title(f"Loading: two views of {timed['image_size']} px, batch {timed['batch_size']}", fontsize=9, loc="left")
    axes.set_xlabel("patches/s", fontsize=7.5)
    return figure


def _lines(axes: Any, title: str, x: str, y: str, lines: Mapping[str, Points], *, powers: bool) -> None:
    """powers: whether both axes grow by powers."""
    colours = itertools.cycle(_LINES)
    for name, points in lines.items():
        ours = name.startswith("ours")
        colour, width = (_OURS, 2.2) if ours else (next(colours), 1.2)
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=width, color=colour, label=name)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set(xlabel=x, ylabel=y)
    if powers:
        axes.set(xscale="log", yscale="log")
    ticks = sorted({each for line in axes.lines for each in line.get_xdata()})
    axes.set_xticks(ticks, [f"{value:,.0f}" for value in ticks], rotation=30 if powers else 0)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def loss(record: Record) -> Any:
    """Time and memory by anchors, a line for each contender."""
    figure, panels = _panels(2, 5.0, 3.8)
    for axes, (value, scale, title, unit) in zip(
        panels,
        (
            ("seconds", 1e3, "NT-Xent, forward and backward: time", "ms"),
            ("peak_bytes", 1 / 2**20, "NT-Xent: memory beyond the embeddings", "MiB"),
        ),
        strict=True,
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for anchors, found in record["summary"].items():
            for name, row in found.items():
                lines.setdefault(LOSSES[name].title, []).append((int(anchors), row[value] * scale))
        _lines(axes, title, "anchors, 2N", unit, lines, powers=True)
    return figure


def curves(record: Record) -> Any:
    """The mean loss of each epoch, averaged over the seeds."""
    lines = {}
    for name, runs in record["runs"].items():
        if found := [run["curve"] for run in runs if "curve" in run]:
            means = map(statistics.fmean, zip(*found, strict=True))
            lines[PRETRAINED[name].title] = list(enumerate(means, start=1))
    figure, (axes,) = _panels(1, 6.6, 3.8)
    title = f"SimCLR at equal work: loss, mean over {len(record['settings']['seeds'])} seeds"
    _lines(axes, title, "epoch", "NT-Xent, nats", lines, powers=False)
    return figure


def scale(record: Record) -> Any:
    """patches/s by GPUs, a panel for each machine and a line for each number of patches."""
    figure, panels = _panels(len(record["machines"]), 5.2, 4.4)
    for axes, node in zip(panels, record["machines"], strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for each in node["predictions"]:
            lines.setdefault(f"{each['patches']:,} patches", []).append((each["gpus"], each["patches_per_s"]))
        _lines(axes, node["name"], "GPUs", "patches/s, predicted", lines, powers=True)
    return figure


# By the kind of a result, as its file's name tells it
PLOTS = {
    "loader": loader,
    "loader-cuda": loader,
    "ntxent-cpu": loss,
    "ntxent-cuda": loss,
    "equal-work": curves,
    "scale": scale,
}

if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
