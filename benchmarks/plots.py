"""Plots of results: FILE.png beside each FILE.json of loader.py, ntxent.py, equal_work.py or scale.py.

    python benchmarks/plots.py benchmarks/results/2026-11-23-loader.json

A bar is the median over rounds, each of which is a dot on it; ours are in colour. What failed or was not started has no bar: the
tables name it with its reason.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders.equal_work import PRETRAINED
from harness import script
from loader import ALL as LOADERS
from ntxent import CONTENDERS as LOSSES
from report import Record

from sharding.cli import positional
from train.records.json_files import read_json

_OURS, _OTHERS = "#2f6f9f", "#b9b9b9"
Lines = Mapping[str, Sequence[tuple[float, float]]]  # by title its points


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
        figure.supxlabel(f"{record['date']}, {record['machine']['cores']} cores", fontsize=7)
        figure.savefig(path.with_suffix(".png"), dpi=110)
        print(path.with_suffix(".png"))


def kind_of(path: Path) -> str:
    """2026-11-23-step-cpu-2.json is of the kind step-cpu."""
    return re.sub(r"^\d{4}-\d\d-\d\d-|-\d+$", "", path.stem)


def loader(record: Record) -> Any:
    """A bar for each contender."""
    from matplotlib.figure import Figure

    timed, runs = record["timed"], {name: runs for name, runs in record["runs"].items() if name in LOADERS and runs}
    figure = Figure(figsize=(8.2, 0.9 + 0.27 * len(runs)), layout="constrained")
    axes = figure.subplots()
    for number, (name, found) in enumerate(runs.items()):
        rates = [run["patches_per_s"] for run in found]
        axes.barh(number, statistics.median(rates), color=_OURS if name.startswith("ours") else _OTHERS)
        axes.plot(rates, [number] * len(rates), ".", color="black", markersize=3)
        axes.text(max(rates), number, f"  {statistics.median(rates):,.0f}", va="center", fontsize=7)
    axes.set_yticks(range(len(runs)), [LOADERS[name].title for name in runs], fontsize=7.5)
    axes.invert_yaxis()
    axes.set(xlabel="patches/s", title=f"Loading: two views of {timed['image_size']} px, batch {timed['batch_size']}")
    return figure


def _panels(panels: Mapping[str, Lines], x: str, y: Sequence[str], scale: str) -> Any:
    """Panels of lines side by side, by title. x: what they share; y: of each; scale: of both axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.6, 5.0 * len(panels)), 4), layout="constrained")
    for axes, (title, lines), label in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), y, strict=True):
        for name, points in lines.items():
            style = {"color": _OURS, "linewidth": 2.2} if name.startswith("ours") else {"linewidth": 1.2}
            axes.plot(*zip(*points, strict=True), marker=".", label=name, **style)
        axes.set(title=title, xlabel=x, ylabel=label, xscale=scale, yscale=scale)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def loss(record: Record) -> Any:
    """Time and memory by anchors, a line for each contender."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    values = {"NT-Xent, forward and backward": ("seconds", 1e3), "NT-Xent, beyond the embeddings": ("peak_bytes", 1 / 2**20)}
    for title, (value, scale) in values.items():
        panels[title] = {}
        for anchors, found in record["summary"].items():
            for name, row in found.items():
                panels[title].setdefault(LOSSES[name].title, []).append((int(anchors), row[value] * scale))
    return _panels(panels, "anchors, 2N", ["ms", "MiB"], "log")


def curves(record: Record) -> Any:
    """The mean loss of each epoch, averaged over the seeds."""
    lines = {}
    for name, runs in record["runs"].items():
        if found := [run["curve"] for run in runs if "curve" in run]:
            means = map(statistics.fmean, zip(*found, strict=True))
            lines[PRETRAINED[name].title] = list(enumerate(means, start=1))
    title = f"SimCLR at equal work: loss, mean over {len(record['settings']['seeds'])} seeds"
    return _panels({title: lines}, "epoch", ["NT-Xent, nats"], "linear")


def scale(record: Record) -> Any:
    """patches/s by GPUs, a panel for each machine and a line for each number of patches."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for node in record["machines"]:
        for each in node["predictions"]:
            line = panels.setdefault(node["name"], {}).setdefault(f"{each['patches']:,} patches", [])
            line.append((each["gpus"], each["patches_per_s"]))
    return _panels(panels, "GPUs", ["patches/s, predicted"] * len(panels), "log")


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
