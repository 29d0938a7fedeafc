"""A short real pretraining by the project's own commands, and a linear classifier on it: is the backbone any better?

    python benchmarks/short_pretraining.py --work DISK/bench --data shards/oral --seconds 60
    python benchmarks/short_pretraining.py --work DISK/bench --epochs 20            # on drawn patches

`train/pretrain.py` runs without Ray, for as many epochs as a first, short run says fit into `--seconds`. Then `train/evaluate.py`
fits the linear classifier on its features, on those of random weights, and on those of ImageNet's weights where they are on this
machine already (nothing is downloaded). All are judged on the set's test split.

Results: <out>/<date>-short-pretraining.json and .md.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Result, check_at_least, draw_labelled_set, run_fresh, script, set_of
from report import Record, Report, Table, packed_line
from worker import ROOT

from sharding.cli import option, required
from train.records.runs import Run

_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130")
_PILOT_EPOCHS = 2  # of which the first one holds what is done once
_METRICS = ("accuracy", "balanced_accuracy", "auroc")


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
    check_at_least(config, batch_size=2, epochs=1, patches=config.batch_size)
    result, work = Result(config.out, "short-pretraining", _PACKAGES), Path(config.work).resolve()
    if config.data is not None:
        data = Path(config.data).resolve()
    else:
        data = draw_labelled_set(work, config.patches, config.image_size, seed=config.seed)
    described = set_of(data)
    settings = ("backbone", "image_size", "batch_size", "optimizer", "seconds", "seed")
    result.record |= {
        "set": {**described, "drawn": config.data is None},
        "settings": {name: getattr(config, name) for name in settings},
        "epochs": config.epochs,
        "runs": {},
    }

    def run(name: str, command: Callable[[], Record]) -> Record:
        def timed() -> Record:
            began = time.monotonic()
            return command() | {"command_s": round(time.monotonic() - began, 1)}

        found = result.attempt(name, name, timed, lambda found: " | ".join(f"{key} {value}" for key, value in found.items()))
        if found:
            result.record["runs"][name] = found
        elif name == "imagenet":  # weights that are not on this machine are no failure
            result.record["missing"][name] = result.record["failed"].pop(name)
        result.save()
        return found or {}

    runs = work / "runs"
    # A name for each setting: what is finished under it is the same.
    name = f"{described['name']}-{config.backbone}-{config.image_size}px-{config.batch_size}-{config.optimizer}-{config.seed}"
    epochs = config.epochs
    if epochs is None:
        pilot = run("pilot", lambda: pretrained(config, data, runs, f"{name}-pilot", _PILOT_EPOCHS))
        epochs = result.record["epochs"] = max(1, int(config.seconds / pilot["epoch_s"])) if pilot else 1
    if run("pretraining", lambda: pretrained(config, data, runs, f"{name}-{epochs}-epochs", epochs)):
        run("pretrained", lambda: judged(config, data, runs, f"{name}-{epochs}-epochs"))
    for weights in ("scratch", "imagenet"):
        run(weights, lambda weights=weights: judged(config, data, runs, weights))  # type: ignore[misc]
    result.finish(report_of(result.record))


def pretrained(config: Config, data: Path, runs: Path, name: str, epochs: int) -> Record:
    """The stage's own metrics. epoch_s: of the last epoch, seconds. Raises RunFailed."""
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
    return {
        "epochs": epochs,
        "steps": last["step"],
        "wall_s": run.record["wall_seconds"],
        "img_per_s": round(2 * rate, 1),
        "data_wait": round(sum(row["data_wait"] for row in steady) / len(steady), 4),
        "epoch_s": round(config.batch_size * last["step"] / epochs / rate, 3),
        "loss_first": round(rows[0]["loss"], 4),
        "loss_last": round(last["loss"], 4),
        "top1_last": round(last["top1"], 4),
    }


def judged(config: Config, data: Path, runs: Path, weights: str) -> Record:
    """The linear classifier's metrics on the test split, each with its interval as the stage gives it. weights: a run's name,
    scratch or imagenet. Raises RunFailed."""
    arguments: dict[str, Any] = {"backbone": weights, "mode": "linear", "image-size": config.image_size, "seed": config.seed}
    arguments["name"] = f"{weights}-{config.backbone}-{config.image_size}px-{config.seed}-linear-{data.name}"
    if weights in ("scratch", "imagenet"):
        arguments["architecture"] = config.backbone
    _command("train/evaluate.py", data, runs, arguments)
    (summary,) = Run(runs / arguments["name"]).result["summary"]  # one fraction of the labels: all
    return {name: summary["metrics"][name] for name in _METRICS} | {name: summary[name] for name in ("labels", "unit", "units")}


def _command(script: str, data: Path, runs: Path, arguments: dict[str, Any], *flags: str) -> None:
    line = [sys.executable, str(ROOT / script), "--data", str(data), "--storage", str(runs), *flags]
    line += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    runs.mkdir(exist_ok=True)
    run_fresh(line, runs / "command.log")


def report_of(record: Record) -> Report:
    """The pretraining's metrics, and what the linear classifier makes of each backbone."""
    s, of = record["settings"], record["set"]
    kind = "drawn" if of["drawn"] else "real"
    text = (
        f"{s['backbone']} at {s['image_size']} px, batch {s['batch_size']}, {s['optimizer']}, on the set {of['name']!r} ({kind}"
        f" patches), seed {s['seed']}."
    )
    lines = [f"- {name}: {value}" for name, value in record["runs"].get("pretraining", {}).items()]
    if why := record["failed"].get("pretraining"):
        lines = [f"The pretraining FAILED: {why}"]
    titles = {"pretrained": f"pretrained, {record['epochs']} epochs", "scratch": "random weights", "imagenet": "ImageNet"}
    whys = {name: f" (FAILED: {text})" for name, text in record["failed"].items()}
    whys |= {name: f" (not there: {text})" for name, text in record["missing"].items()}
    rows = []
    for name, title in titles.items():
        found = record["runs"].get(name)
        rows.append([title + whys.get(name, ""), *(_shown(found[metric]) if found else "-" for metric in _METRICS)])
    table = Table(["weights", *(name.replace("_", " ") for name in _METRICS)], rows)
    return Report(record, "A short pretraining", [text, packed_line(of), *lines, table])


def _shown(metric: dict[str, float | None]) -> str:
    mean, low, high = (metric[name] for name in ("mean", "low", "high"))
    if mean is None:  # the AUROC of a single class
        return "-"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    # Read by the libraries that would download weights: what is not here is not there.
    os.environ["HF_HUB_OFFLINE"] = "1"
    script(main, Config, __file__, __doc__)
