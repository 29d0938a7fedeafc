"""The judging stages: the linear protocol, fine-tuning, and the supervised baseline."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from models.backbones import build_backbone
from models.heads import LinearHead
from models.weights import apply_init, load_backbone_weights
from pipelines.recipes import describe_recipe, get_recipe
from pipelines.shards import ShardReader
from sharding.manifest import class_names, fingerprint
from sharding.selection import select
from train.config import EvaluateConfig
from train.features import compute_features, frozen_features
from train.heads_fit import fit_with_validation
from train.inputs import Input, SetInput, gib, open_set, place_of
from train.loop import HEAD_NAME, Job
from train.methods import Supervised
from train.metrics import TITLES, score
from train.parents import Parent, resolve_init
from train.progress import follow
from train.provenance import learnt_before, leave_record, look_for
from train.report import write_report
from train.runs import Run, Stage, find_run, identity, replacing
from train.starting import describe_model, describe_rate
from train.workers import run_job

_PEAKS = {"supervised": 1e-3, "finetune": 1e-4}


@dataclass(frozen=True)
class Labels:
    """Which patches are learnt from and judged on. used: (n,) ids; held_out: (n,) bool, the validation part of them; test:
    ids; labels: by patch id."""

    classes: list[str]
    used: np.ndarray
    held_out: np.ndarray
    test: np.ndarray
    labels: np.ndarray


def evaluate(config: EvaluateConfig) -> Run:
    """Run the stage, or find it finished. Returns its run.

    Raises ValueError for what the user can put right: data without labels, splits that are not there, weights that do not
    fit, a name that is taken.
    """
    with open_set(config.data, gib(config.cache_gib)) as reader:
        return _evaluate(config, reader)


def _evaluate(config: EvaluateConfig, reader: ShardReader) -> Run:
    selection = {"split": config.split, "fraction": config.fraction, "balance": config.balance, "seed": config.seed}
    chosen = _choose(config, reader, selection)
    parent, architecture, image_size = _backbone(config)
    learnt = Input((SetInput(place_of(config.data), fingerprint(reader.folder), chosen.used),), cache_bytes=gib(config.cache_gib))
    run = Run(Path(config.storage) / (config.name or _default_name(config, parent, architecture)))
    settled = identity(config) | {"image_size": image_size, "architecture": architecture}
    stage = Stage(config.mode, settled, learnt.fingerprint, parent.key)
    trains = config.mode != "linear"
    batch_size = _checked_batch(config, learnt.patches) if trains else None
    recipe = Supervised.recipe_name if trains else "eval"
    reads = learnt.describe(selection=selection, recipe=recipe, image_size=image_size, seed=config.seed, batch_size=batch_size)
    if not run.begin(stage, config, reads):
        print(f"{run.name}: finished already, {run.folder}", flush=True)
        return run
    print(
        f"{run.name}: {config.mode} of {architecture} on {len(chosen.used):,} labels ({config.fraction:.0%} of {config.split})"
        f" of {config.data}, judged on {len(chosen.test):,} patches",
        flush=True,
    )
    before = look_for(learnt_before(parent), reader, chosen.test)
    started = time.monotonic()
    if batch_size is None:
        probabilities, extra = _linear(config, reader, chosen, parent, architecture, image_size)
        device = "CPU"
    else:
        leave_record(run.folder, kind=config.mode, learnt=learnt, parent=parent)
        job = _job(config, chosen, learnt, parent, architecture, image_size, batch_size, run, stage)
        probabilities, extra, device = _trained(config, reader, chosen, job, run)
    figures = score(probabilities, chosen.labels[chosen.test])
    _write_predictions(run.folder / "predictions.parquet", reader, chosen, probabilities)
    result = {
        "kind": config.mode,
        "key": stage.key,
        "chain": parent.chain,
        "architecture": architecture,
        "classes": chosen.classes,
        "labels": len(chosen.used),
        "test_patches": len(chosen.test),
        "split_rule": f"{config.fraction:.0%} of split {config.split!r}, judged on split {config.test_split!r}",
        "recipe": describe_recipe(get_recipe("eval")),
        "warnings": [*before.warnings, *_warnings(reader, chosen)],
        "notes": before.notes,
        "metrics": figures,
    }
    run.finish(result | extra, wall_seconds=time.monotonic() - started, device=device)
    report = write_report([run], run.folder / "report.html")
    shown = ", ".join(f"{TITLES[name]} {figures[name]:.3f}" for name in ("accuracy", "balanced_accuracy"))
    print(f"{run.name}: {shown}, {report}", flush=True)
    return run


def _choose(config: EvaluateConfig, reader: ShardReader, selection: dict[str, Any]) -> Labels:
    classes = class_names(reader.folder)
    if len(classes) < 2:
        raise ValueError(f"{config.data} has {len(classes)} classes: judging needs labels of at least two (build with {{class}})")
    if config.split == config.test_split:
        raise ValueError(f"--split and --test-split are both {config.split!r}: a backbone is not judged on what it learnt from")
    choose = functools.partial(select, reader.manifest, **selection)
    used, held_out = choose(), choose(validation=config.validation, part="validation")
    test = select(reader.manifest, split=config.test_split)
    labels = reader.labels
    for name, ids in ((config.split, used), (config.test_split, test)):
        if (labels[ids] < 0).any():
            raise ValueError(f"{config.data}: split {name!r} has patches without a label")
    if len(np.unique(labels[used])) < 2:
        raise ValueError(f"{config.data}: the used labels of split {config.split!r} are all of one class")
    if len(held_out) in (0, len(used)):
        raise ValueError(f"--validation {config.validation:g} of {len(used)} labels leaves one part empty: use more labels")
    return Labels(classes, used, np.isin(used, held_out), test, labels)


def _backbone(config: EvaluateConfig) -> tuple[Parent, str, int]:
    """What the weights come from, the architecture and the image size."""
    if config.mode == "supervised":
        run = find_run(config.backbone, config.storage)
        card = resolve_init(config.backbone, config.storage).card if run else {}
        return Parent("scratch", "scratch", [], {}), card.get("backbone", config.backbone), _size(config, card)
    parent = resolve_init(config.backbone, config.storage)
    architecture = config.architecture or parent.card.get("backbone")
    if architecture is None:
        raise ValueError(f"{config.backbone} has no model card that says what it is: give --architecture, a timm model name")
    return parent, architecture, _size(config, parent.card)


def _size(config, card):
    return config.image_size or card.get("image_size") or 224


def _default_name(config, parent, architecture):
    origin = parent.run.name if parent.run else architecture
    return f"{origin}-{config.mode}-{config.fraction:g}-seed{config.seed}"


def _linear(config, reader, chosen, parent, architecture, image_size):
    torch.manual_seed(config.seed)  # --backbone scratch: random weights, the same ones every time
    backbone = build_backbone(architecture, image_size)
    lines = apply_init(backbone, architecture, parent.source)
    whole_split = select(reader.manifest, split=config.split)  # so that every fraction and seed finds the same file
    features = {
        name: frozen_features(
            backbone,
            reader,
            ids,
            recipe=get_recipe("eval"),
            image_size=image_size,
            cache=Path(config.storage) / ".features",
            threads=config.threads or None,
            title=f"features of {name}",
        )
        for name, ids in {"train": whole_split, "test": chosen.test}.items()
    }
    rows = np.searchsorted(whole_split, chosen.used)
    head, losses = fit_with_validation(
        features["train"][rows], chosen.labels[chosen.used], chosen.held_out, classes=len(chosen.classes)
    )
    extra = {"init": lines, "decay": head.decay, "validation_log_loss": {f"{decay:g}": loss for decay, loss in losses.items()}}
    return head.probabilities(features["test"]), extra


def _checked_batch(config: EvaluateConfig, labels: int) -> int:
    if config.batch_size < 1:
        raise ValueError(f"--batch-size {config.batch_size}: a batch needs at least 1 patch")
    if config.learning_rate is not None and not config.learning_rate > 0:
        raise ValueError(f"--learning-rate {config.learning_rate:g}: give a rate above 0, or leave it out for the default")
    return min(config.batch_size, labels)


def _job(config, chosen, learnt, parent, architecture, image_size, batch_size, run, stage):
    return Job(
        folder=run.folder,
        input=learnt,
        method=Supervised(classes=len(chosen.classes)),
        backbone=architecture,
        init=parent.source,
        image_size=image_size,
        batch_size=batch_size,
        epochs=config.epochs,
        optimizer=config.optimizer,
        peak_learning_rate=_PEAKS[config.mode] if config.learning_rate is None else config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_epochs=min(config.warmup_epochs, config.epochs / 10),
        schedule=config.schedule,
        precision=config.precision,
        seed=config.seed,
        threads=config.threads,
        compile=False,
        log_every=config.log_every,
        checkpoint_every=0,
        max_failures=config.max_failures,
        card={"method": config.mode, "chain": [*parent.chain, f"{config.mode} on {learnt.name}"], "key": stage.key},
    )


def _trained(config, reader, chosen, job, run):
    model = describe_model(
        job.method, backbone=job.backbone, image_size=job.image_size, init=job.init, weight_decay=job.weight_decay
    )
    for line in [*model, describe_rate(job)]:
        print(f"{run.name}: {line}", flush=True)
    with follow(run, steps=job.steps, title=run.name, starting="starting"):
        device = run_job(job, config.workers)
    backbone = build_backbone(job.backbone, job.image_size)
    load_backbone_weights(backbone, run.folder)
    head = LinearHead(int(backbone.num_features), len(chosen.classes))  # type: ignore[arg-type]
    head.load_state_dict(torch.load(run.folder / HEAD_NAME, weights_only=True, map_location="cpu"))
    features = compute_features(
        backbone,
        reader,
        chosen.test,
        recipe=get_recipe("eval"),
        image_size=job.image_size,
        title="predictions",
        threads=job.threads or None,
    )
    with torch.no_grad():
        probabilities = torch.softmax(head(torch.from_numpy(features)).double(), dim=1).numpy()
    return probabilities, {"batch_size": job.batch_size, "steps": job.steps}, device


def _write_predictions(path: Path, reader: ShardReader, chosen: Labels, probabilities: np.ndarray) -> None:
    rows = reader.manifest.select(["id", "key", "group"]).take(pa.array(chosen.test))
    flat = pa.array(probabilities.ravel())
    table = (
        rows.append_column("label", pa.array(chosen.labels[chosen.test]))
        .append_column("prediction", pa.array(probabilities.argmax(1)))
        .append_column("probabilities", pa.FixedSizeListArray.from_arrays(flat, probabilities.shape[1]))
    )
    with replacing(path) as partial:
        pq.write_table(table, partial)


def _warnings(reader: ShardReader, chosen: Labels) -> list[str]:
    """What a reviewer would ask about."""
    found = []
    groups = reader.manifest["group"].cast(pa.string()).to_numpy(zero_copy_only=False)
    learnt = {group for group in groups[chosen.used] if group is not None}
    shared = sum(group in learnt for group in groups[chosen.test])
    if shared:
        found.append(f"{shared:,} of {len(chosen.test):,} test patches are of a group (slide or patient) that was learnt from")
    if not learnt:
        found.append("no groups (slides or patients) are known, so it cannot be said whether the test is of other ones")
    absent = [chosen.classes[k] for k in range(len(chosen.classes)) if not (chosen.labels[chosen.test] == k).any()]
    if absent:
        found.append(f"the test split has no patch of {', '.join(absent)}")
    return found
