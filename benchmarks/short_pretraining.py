"""A short real pretraining by the project's own commands, and what a linear classifier makes of it: is the backbone any better?

    python benchmarks/short_pretraining.py --work DISK/bench --data shards/oral --seconds 60
    python benchmarks/short_pretraining.py --work DISK/bench --epochs 20            # on drawn patches

`train/pretrain.py` runs without Ray, for as many epochs as a first, short run says fit into `--seconds`; then `train/evaluate.py`
fits the linear classifier on its features, on those of random weights, and on those of ImageNet's weights where they are on this
machine already (nothing is downloaded). All are judged on the set's test split.

Results go to <out>/<date>-short-pretraining.json, written after every command, and at the end to the same name's .md. Where a
command failed, the exit code is 1.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

from measuring import (  # noqa: E402
    RunFailed,
    conclude,
    heading,
    machine,
    markdown_table,
    new_path,
    packed,
    record_of,
    run_fresh,
    set_of,
    versions_of,
)

from sharding.cli import option, required, run_script  # noqa: E402
from sharding.drawn_patches.dataset import LAYOUTS, DrawConfig, draw_set  # noqa: E402
from sharding.packing import build_shards  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import Run, write_json  # noqa: E402

_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130")
_PILOT_EPOCHS = 2  # of which the first one holds what is done once
_SLIDES = 24
_FIGURES = ("accuracy", "balanced_accuracy", "auroc")


@dataclass(frozen=True)
class Config:
    """What is pretrained on what, and for how long."""

    work: str = required("a folder to work in: drawn patches stay there, and the runs")
    out: str = option("benchmarks/results", "folder for the results")
    data: str | None = option(None, "a labelled shard set with a train and a test split; default: patches are drawn")
    backbone: str = option("resnet18", "any timm model")
    image_size: int = option(96, "side of the views, pixels")
    batch_size: int = option(256, "patches per step")
    optimizer: str = option("adam", "lars, adam, adamw or sgd")
    seconds: float = option(60.0, "how long the pretraining should take")
    epochs: int | None = option(None, "epochs, instead of as many as --seconds has room for")
    patches: int = option(1800, "patches to draw")
    seed: int = option(42, "seed of everything random")


def main(config: Config) -> None:
    for name, least in (("batch_size", 2), ("epochs", 1), ("patches", config.batch_size)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range: give at least {least}")
    console = Console(highlight=False, soft_wrap=True)
    work = Path(config.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    started = machine(available_cores())
    data = Path(config.data).resolve() if config.data is not None else drawn(config, work)
    described = set_of(data)
    path = new_path(Path(config.out), "short-pretraining")
    record: dict[str, Any] = {
        **record_of(started, versions_of(_PACKAGES)),
        "set": {**described, "drawn": config.data is None},
        "settings": {
            name: getattr(config, name) for name in ("backbone", "image_size", "batch_size", "optimizer", "seconds", "seed")
        },
        "epochs": config.epochs,
        "runs": {},
        "missing": {},
        "failed": {},
    }

    def run(name: str, command: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        began = time.monotonic()
        try:
            found = command() | {"command_s": round(time.monotonic() - began, 1)}
            record["runs"][name] = found
            console.print(f"{name}: {' | '.join(f'{key} {value}' for key, value in found.items())}", markup=False)
        except RunFailed as error:  # what the others find is worth having; the exit code tells
            found, whose = {}, record["missing"] if name == "imagenet" else record["failed"]
            whose[name] = str(error)
            console.print(f"{name}: {error}", markup=False)
        write_json(path, record)
        return found

    runs = work / "runs"
    # A name for each setting: what is finished under it is the same.
    name = f"{described['name']}-{config.backbone}-{config.image_size}px-{config.batch_size}-{config.optimizer}-{config.seed}"
    epochs = config.epochs
    if epochs is None:
        pilot = run("pilot", lambda: pretrained(config, data, runs, f"{name}-pilot", _PILOT_EPOCHS))
        epochs = record["epochs"] = max(1, int(config.seconds / pilot["epoch_s"])) if pilot else 1
    run("pretraining", lambda: pretrained(config, data, runs, f"{name}-{epochs}-epochs", epochs))
    if "pretraining" in record["runs"]:
        run("pretrained", lambda: judged(config, data, runs, f"{name}-{epochs}-epochs"))
    for weights in ("scratch", "imagenet"):
        run(weights, lambda weights=weights: judged(config, data, runs, weights))  # type: ignore[misc]
    conclude(
        record,
        path,
        console,
        markdown="\n".join([*heading("A short pretraining", record), *body(record), ""]),
        tables=[table(record)],
        lines=[],
    )


def drawn(config: Config, work: Path) -> Path:
    """A shard set of drawn patches in three classes, split by slide."""
    images = work / f"breast-{config.patches}-{config.image_size}px"
    draw_set(DrawConfig(str(images), "breast", config.patches, config.image_size, _SLIDES, config.seed, available_cores()))
    shards = images.with_name(f"{images.name}-shards")
    split = "train=0.7,test=0.3"
    build_shards([images], shards, layout=LAYOUTS["breast"], group_by="slide", split=split, workers=available_cores())
    return shards


def pretrained(config: Config, data: Path, runs: Path, name: str, epochs: int) -> dict[str, Any]:
    """The stage's own figures. epoch_s: of the last epoch, seconds. Raises RunFailed."""
    arguments = {
        "name": name,
        "backbone": config.backbone,
        "image-size": config.image_size,
        "batch-size": config.batch_size,
        "optimizer": config.optimizer,
        "epochs": epochs,
        "workers": 0,
        "probe-every": 0,
        "log-every": 5,
        "checkpoint-every": 10**9,  # of a small set an epoch takes less time than writing one
        "seed": config.seed,
    }
    # Compiling takes longer than it saves in so short a run.
    _command("train/pretrain.py", data, runs, arguments, "--no-compile")
    run = Run(runs / name)
    rows = run.metrics()
    steady = rows[len(rows) // 2 :]  # what is done once is in the first rows
    rate = sum(row["patches_per_s"] for row in steady) / len(steady)
    last = rows[-1]
    patches = config.batch_size * last["step"] / epochs  # of an epoch
    return {
        "epochs": epochs,
        "steps": last["step"],
        "wall_s": run.record["wall_seconds"],
        "img_per_s": round(2 * rate, 1),
        "data_wait": round(sum(row["data_wait"] for row in steady) / len(steady), 4),
        "epoch_s": round(patches / rate, 3),
        "loss_first": round(rows[0]["loss"], 4),
        "loss_last": round(last["loss"], 4),
        "top1_last": round(last["top1"], 4),
    }


def judged(config: Config, data: Path, runs: Path, weights: str) -> dict[str, Any]:
    """The linear classifier's figures on the test split, each with its interval as the stage gives it. weights: a run's name,
    scratch or imagenet. Raises RunFailed."""
    arguments: dict[str, Any] = {"backbone": weights, "mode": "linear", "image-size": config.image_size, "seed": config.seed}
    arguments["name"] = f"{weights}-{config.backbone}-{config.image_size}px-{config.seed}-linear-{data.name}"
    if weights in ("scratch", "imagenet"):
        arguments["architecture"] = config.backbone
    _command("train/evaluate.py", data, runs, arguments)
    (summary,) = Run(runs / arguments["name"]).result["summary"]  # one fraction of the labels: all
    return {name: summary["metrics"][name] for name in _FIGURES} | {name: summary[name] for name in ("labels", "unit", "units")}


def _command(script: str, data: Path, runs: Path, arguments: dict[str, Any], *flags: str) -> None:
    line = [sys.executable, str(ROOT / script), "--data", str(data), "--storage", str(runs), *flags]
    line += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    runs.mkdir(exist_ok=True)
    run_fresh(line, runs / "command.log")


# ---- Tables ----


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What the linear classifier makes of each backbone."""
    titles = {"pretrained": f"pretrained, {record['epochs']} epochs", "scratch": "random weights", "imagenet": "ImageNet"}
    why = {name: f" (FAILED: {text})" for name, text in record["failed"].items()}
    why |= {name: f" (not there: {text})" for name, text in record["missing"].items()}
    rows = []
    for name, title in titles.items():
        found = record["runs"].get(name)
        cells = [_shown(found[figure]) if found else "-" for figure in _FIGURES]
        rows.append([title + why.get(name, ""), *cells])
    return ["weights", *(name.replace("_", " ") for name in _FIGURES)], rows


def _shown(figure: dict[str, float | None]) -> str:
    mean, low, high = (figure[name] for name in ("mean", "low", "high"))
    if mean is None:  # the AUROC of a single class
        return "-"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def body(record: dict[str, Any]) -> list[str]:
    """What follows the heading."""
    s, of = record["settings"], record["set"]
    lines = [
        f"{s['backbone']} at {s['image_size']} px, batch {s['batch_size']}, {s['optimizer']}, on the set {of['name']!r}"
        f" ({'drawn' if of['drawn'] else 'real'} patches), seed {s['seed']}.",
        "",
        packed(of),
        "",
    ]
    if found := record["runs"].get("pretraining"):
        lines += [f"- {name}: {value}" for name, value in found.items()] + [""]
    elif why := record["failed"].get("pretraining"):
        lines += [f"The pretraining FAILED: {why}", ""]
    return lines + markdown_table(*table(record))


if __name__ == "__main__":
    # Read by the libraries that would download weights: what is not here is not there.
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(run_script(main, Config, prog="short_pretraining.py", description=(__doc__ or "").splitlines()[0]))
