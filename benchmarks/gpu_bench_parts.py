"""The parts of the GPU benchmark: which of the benchmarks each one runs, for how long, and how its result is shown."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gpu_check
import loader_report
import ntxent_report
import short_pretraining
import step_options
import step_report
from loader_contenders import CONTENDERS

Record = dict[str, Any]

FULL = {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "patches": 8192}
DRY = {"backbone": "test_resnet", "image_size": 32, "batch_size": 4, "patches": 64}
_DRY_LOADERS = ["torchvision-v2", "kornia", "ours", "dali", "decode"]


@dataclass(frozen=True)
class Setting:
    """What the parts share. work: where patches and shard sets stay; data: a labelled shard set to pretrain on, None: one is
    drawn; commit: of the code."""

    work: Path
    dry: bool
    data: str | None
    commit: str

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def sizes(self) -> dict[str, Any]:
        return DRY if self.dry else FULL

    @property
    def drawn(self) -> Path | None:
        """The shard set that the part `data` made; None where it did not."""
        return next(iter(sorted(self.work.glob("images-*-shards"))), None)


class Part(NamedTuple):
    """seconds: that it may take; least: that must be left to begin with it. arguments: the script's name and what it is called
    with, given the setting, the seconds that it has, and whatever follows from these. body: Markdown of what the script wrote,
    which may be cut short."""

    title: str
    seconds: float
    least: float
    arguments: Callable[[Setting, float], list[Any]]
    body: Callable[[Record], list[str]]


def _data(s: Setting, seconds: float) -> list[Any]:
    return ["patch_set.py", "--work", s.work, "--patches", s.sizes["patches"], "--size", s.sizes["image_size"]]


def _check(s: Setting, seconds: float, *steps: str) -> list[Any]:
    arguments = ["gpu_check.py", "--commit", s.commit, "--seconds", max(1, round(seconds - 5)), "--steps", *steps]
    for name in ("backbone", "image_size", "batch_size"):
        arguments += [f"--{name.replace('_', '-')}", s.sizes[name]]
    return [*arguments, *(["--data", s.drawn] if s.drawn else []), *(["--dry"] if s.dry else [])]


def _correctness(s: Setting, seconds: float) -> list[Any]:
    return _check(s, seconds, "environment", "decode", "views", "purity")  # what is fast is the business of the others


def _threads(s: Setting, seconds: float) -> list[Any]:
    return _check(s, seconds, "loader")


def _step_sizes(s: Setting) -> list[Any]:
    found: list[Any] = ["--work", s.work, "--device", s.device]
    for name, value in s.sizes.items():
        found += [f"--{name.replace('_', '-')}", value]
    return found


def _cores(s: Setting) -> list[Any]:
    return ["--cores", 1] if s.dry else []  # on cores that others use too, threads that wait for each other are slower than one


def _step(s: Setting, seconds: float) -> list[Any]:
    timed = ["--rounds", 1, "--seconds", 0.2 if s.dry else 6, "--limit", max(1, round(seconds)), *_cores(s)]
    return ["step.py", *_step_sizes(s), *timed]


def _loss(s: Setting, seconds: float) -> list[Any]:
    timed = ["--timed", 0.02, "--anchors", 64, *_cores(s)] if s.dry else ["--timed", 0.5, "--in-process"]
    return ["ntxent.py", "--device", s.device, "--rounds", 1, *timed]


def _loader(s: Setting, seconds: float) -> list[Any]:
    # Dry, one of each kind.
    names = _DRY_LOADERS if s.dry else [name for name, contender in CONTENDERS.items() if "cuda" in contender.devices]
    sizes = ["--patches", s.sizes["patches"], "--size", s.sizes["image_size"], "--batch-size", s.sizes["batch_size"]]
    timed = ["--rounds", 1, "--seconds", 0.1, "--lap", 2] if s.dry else ["--rounds", 1, "--seconds", 3, "--lap", 16]
    timed += _cores(s)
    return ["loader.py", "--work", s.work, "--device", s.device, *sizes, *timed, "--contenders", *names]


def _options(s: Setting, seconds: float) -> list[Any]:
    # Not every CPU's host has the C++ compiler that it takes there.
    timed = ["--seconds", 0.1, "--batches", 2, 4, "--no-compile"] if s.dry else []
    return ["step_options.py", *_step_sizes(s), *timed, "--groups", "options", "batches"]


def _two_pass(s: Setting, seconds: float) -> list[Any]:
    timed = ["--seconds", 0.1, "--batches", 4] if s.dry else []
    return ["step_options.py", *_step_sizes(s), *timed, "--groups", "two-pass"]


def _pretraining(s: Setting, seconds: float) -> list[Any]:
    sizes = ["--backbone", "test_resnet", "--image-size", 32, "--batch-size", 16, "--patches", 120] if s.dry else []
    # Half of the time is for the commands' starts and for the classifiers.
    timed = ["--epochs", 2] if s.dry else ["--seconds", max(1, round(seconds / 2 - 15))]
    return ["short_pretraining.py", "--work", s.work, *sizes, *timed, *(["--data", s.data] if s.data else [])]


def _step_body(record: Record) -> list[str]:
    return step_report.body(step_report.completed(record))


def _loss_body(record: Record) -> list[str]:
    return ntxent_report.body(ntxent_report.completed(record))


def _loader_body(record: Record) -> list[str]:
    return loader_report.body(loader_report.completed(record))


# By value: a GPU is lent for minutes, and what comes last may find no time left.
PARTS = {
    "data": Part("Patches", 45, 0, _data, lambda record: []),
    "check": Part("Correctness on the device", 80, 20, _correctness, gpu_check.body),
    "step": Part("A training step", 190, 30, _step, _step_body),
    "loss": Part("NT-Xent", 45, 15, _loss, _loss_body),
    "loader": Part("The loader", 110, 20, _loader, _loader_body),
    "options": Part("Options of a training step", 90, 20, _options, step_options.body),
    "pretraining": Part("A short pretraining", 110, 45, _pretraining, short_pretraining.body),
    "two-pass": Part("Micro-batches in two passes", 30, 15, _two_pass, step_options.body),
    "threads": Part("The loader by threads", 45, 25, _threads, gpu_check.body),
}
NEED_NO_DATA = {"data", "loss", "pretraining"}


def _body(name: str, found: Record) -> list[str]:
    try:
        return PARTS[name].body(found)
    # What is cut short may lack what a table takes for granted, and the other parts are still to come.
    except Exception as error:
        return [f"This result cannot be shown ({type(error).__name__}: {error}); it is in the JSON file."]


def markdown(record: Record, head: list[str]) -> str:
    """head: the lines above. A table of the parts, and what each of them found, also where it was cut short."""
    lines = [*head, "| part | status | seconds | |", "| --- | --- | ---: | --- |"]
    for name, part in record["parts"].items():
        why = " ".join(part.get("why", "").split()).replace("|", "/")
        lines.append(f"| {name} | {part['status']} | {part.get('seconds', '-')} | {why} |")
    for name, part in record["parts"].items():
        if found := part.get("found"):
            lines += ["", f"## {PARTS[name].title}", "", f"`{part['command']}`", "", *_body(name, found)]
    # A part's body ends with a table, a list or an empty line.
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, ""]))
