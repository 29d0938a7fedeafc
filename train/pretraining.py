"""The pretraining stage: a backbone from unlabelled patches."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.recipes import describe_recipe
from sharding.manifest import fingerprint
from sharding.selection import select
from train.config import PretrainConfig
from train.inputs import Input, SetInput, gib, open_set, parse_mix, place_of
from train.loop import Job
from train.methods import METHODS
from train.parents import resolve_init
from train.progress import follow
from train.report import write_report
from train.runs import Run, Stage, identity
from train.schedules import default_learning_rate
from train.workers import run_job


def pretrain(config: PretrainConfig) -> Run:
    """Run the stage, or find it finished. Returns its run.

    Raises ValueError for what the user can put right: data, names, sizes and weights that do not fit.
    """
    selection = {"split": config.split, "fraction": config.fraction, "seed": config.seed}
    chosen = _choose(config, selection)
    _check(config, chosen.patches)
    parent = resolve_init(config.init, config.storage, backbone=config.backbone)
    run = Run(Path(config.storage) / config.name)
    stage = Stage("pretrain", identity(config), chosen.fingerprint, parent.key)
    method = METHODS[config.method](config)
    reads = chosen.describe(
        selection=selection,
        recipe=method.recipe_name,
        image_size=config.image_size,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    if not run.begin(stage, config, reads):
        print(f"{run.name}: finished already, {run.folder}", flush=True)
        return run
    job = Job(
        folder=run.folder,
        input=chosen,
        method=method,
        backbone=config.backbone,
        init=parent.source,
        image_size=config.image_size,
        batch_size=config.batch_size,
        epochs=config.epochs,
        optimizer=config.optimizer,
        peak_learning_rate=config.learning_rate or default_learning_rate(config.optimizer, config.batch_size),
        weight_decay=config.weight_decay,
        warmup_epochs=min(config.warmup_epochs, config.epochs / 10),
        precision=config.precision,
        seed=config.seed,
        threads=config.threads,
        compile=config.compile,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        max_failures=config.max_failures,
        card={
            "method": config.method,
            "chain": [*parent.chain, f"{config.method} on {chosen.name}"],
            "key": stage.key,
        },
    )
    print(
        f"{run.name}: {config.method} of {config.backbone} on {chosen.patches:,} patches of {_sets(config)}"
        f" (split {config.split}), {job.steps:,} steps of {config.batch_size}",
        flush=True,
    )
    started = time.monotonic()
    with follow(run, steps=job.steps, title=run.name, starting="starting the workers" if config.workers else "starting"):
        device = run_job(job, config.workers)
    _finish(run, job, stage, time.monotonic() - started, device)
    return run


def _choose(config: PretrainConfig, selection: dict[str, Any]) -> Input:
    sets, cache_bytes = [], gib(config.cache_gib)
    for shards, weight in [(config.data, 1.0), *parse_mix(config.mix)]:
        with open_set(shards, cache_bytes) as reader:
            try:
                ids = select(reader.manifest, **selection)
            except ValueError as error:
                raise ValueError(f"{shards}: {error}") from None
            sets.append(SetInput(place_of(shards), fingerprint(reader.folder), ids, weight))
    return Input(tuple(sets), config.shuffle_window, cache_bytes)


def _sets(config: PretrainConfig) -> str:
    return " + ".join([config.data, *config.mix])


def _check(config: PretrainConfig, patches: int) -> None:
    if config.epochs < 1:
        raise ValueError(f"--epochs {config.epochs}: train for at least one")
    if config.batch_size < 2:
        raise ValueError(f"--batch-size {config.batch_size}: a contrastive loss needs at least 2 patches")
    if config.batch_size > patches:
        raise ValueError(
            f"--batch-size {config.batch_size} is larger than the {patches} selected patches of {_sets(config)}:"
            " choose a smaller batch, another split or a larger fraction"
        )
    if config.workers < 0 or config.batch_size % max(1, config.workers):
        raise ValueError(f"--batch-size {config.batch_size} is the global batch and must divide by --workers {config.workers}")
    if config.shuffle_window is not None and config.shuffle_window < 1:
        raise ValueError(f"--shuffle-window {config.shuffle_window}: give at least 1 shard, or leave it out to shuffle all")
    if config.log_every < 1 or config.checkpoint_every < 0:
        raise ValueError("--log-every must be at least 1, --checkpoint-every at least 0")


def _finish(run, job, stage, seconds, device):
    rows = run.metrics()
    last = rows[-1]
    result = {
        "kind": "pretrain",
        "key": stage.key,
        "chain": job.card["chain"],
        "patches": job.input.patches,
        "steps": job.steps,
        "recipe": describe_recipe(job.method.recipe),
        "final": {name: last[name] for name in ("loss", "top1") if name in last},
        "nothing_learned_loss": float(np.log(2 * job.batch_size - 1)),
        "patches_per_s": float(np.median([row["patches_per_s"] for row in rows])),
        "data_wait": float(np.median([row["data_wait"] for row in rows])),
        "init": json.loads((run.folder / "init.json").read_text()),
    }
    run.finish(result, wall_seconds=seconds, device=device)
    report = write_report([run], run.folder / "report.html")
    loss = "is not a number: try a smaller --learning-rate" if last["loss"] is None else f"{last['loss']:.3f}"
    print(f"{run.name}: loss {loss} (nothing learned: {result['nothing_learned_loss']:.3f}), {report}", flush=True)
