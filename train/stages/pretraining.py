"""The pretraining stage: a backbone from unlabelled patches."""

import contextlib
import functools
import json
import time
from typing import Any

import numpy as np

from pipelines.recipes import describe_recipe
from sharding.cli import check_numbers
from sharding.selection import select
from train.cluster.launcher import run_job, steps_done
from train.cluster.ray_cluster import gpus_with_bf16
from train.config import PretrainConfig, worker_range
from train.records.data import Input, SetInput, cache_limit, open_set, parse_mix
from train.records.init_weights import InitialWeights, resolve_init
from train.records.provenance import write_training_record
from train.records.runs import Run, Stage, identity, named_run
from train.reporting.kept_views import keep_views
from train.reporting.report_writer import write_report
from train.trainer.grad_cache import check_micro_batch
from train.trainer.health_checks import HealthChecks
from train.trainer.loop import DAMAGED_NAME, Job
from train.trainer.methods import Method, build_method
from train.trainer.model_summary import describe_model, describe_rate
from train.trainer.online_probe import build_probe
from train.trainer.optim import peak_learning_rate
from train.trainer.profiler import SKIPPED, TRACE_NAME, WARM_UP
from train.trainer.progress import follow


def pretrain(config: PretrainConfig) -> Run:
    """Run the stage, or find it finished. Returns its run.

    Raises ValueError for what the user can put right: data, names, sizes and weights that do not fit.
    """
    # ---- Method, data and initial weights ----

    method = build_method(config)
    peak = peak_learning_rate(config.learning_rate, optimizer=config.optimizer, batch_size=config.batch_size, rule=config.lr_rule)
    chosen, parent, run = _resolve_inputs(config)
    probe, probe_line = build_probe(config)
    describe = functools.partial(
        describe_model,
        method,
        backbone=config.backbone,
        image_size=config.image_size,
        init=parent.source,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
    )
    # Before Ray is asked for its GPUs, so that a mistake shows in seconds. Of a run that has begun, the config is compared first.
    model_lines = None if run.has_work() else describe()
    precision = _settle_precision(config, run)

    # ---- The run's record, unless it is finished ----

    stage = _stage(config, method, precision, chosen, parent)
    reads = chosen.describe(
        selection=_selection(config),
        recipe=method.recipe_name,
        image_size=config.image_size,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    if not run.begin(
        stage, config, reads, lambda: write_training_record(run.folder, kind="pretrain", data=chosen, parent=parent)
    ):
        print(f"{run.name}: finished already, {run.place}", flush=True)
        return run

    # ---- Train ----

    job = Job.from_config(
        config,
        folder=run.folder,
        url=run.url,
        input=chosen,
        method=method,
        init=parent.address,
        peak_learning_rate=peak,
        warmup_epochs=min(config.warmup_epochs, config.epochs / 10),
        precision=precision,
        probe=probe,
        card={
            "method": config.method,
            "chain": [*parent.chain, f"{config.method} on {chosen.name}"],
            "key": stage.key,
        },
    )
    print(
        f"{run.name}: {config.method} of {config.backbone} on {chosen.patches:,} patches of {_set_names(config)}"
        f" (split {config.split}), {job.steps:,} steps of {config.batch_size}",
        flush=True,
    )
    done = steps_done(job)
    if done:
        starting = f"resuming from step {done:,}"
    else:
        for line in [*(model_lines or describe()), describe_rate(job), probe_line]:
            print(f"{run.name}: {line}", flush=True)
        starting = "starting the workers" if worker_range(config.workers)[1] else "starting"
    started = time.monotonic()
    checks = _health_checks(job)
    with follow(run, steps=job.steps, title=run.name, starting=starting, after=done, accuracy=method.accuracy, checks=checks):
        device = run_job(job, config.workers, config.gpus_per_worker, config.cpus_per_worker)
    if config.profile:
        print(f"{run.name}: {_profile_message(run)}", flush=True)

    # ---- Result and report ----

    _finish(run, config, job, stage, time.monotonic() - started, device)
    return run


def stage_of(config: PretrainConfig) -> Stage:
    """What `pretrain` would run, without anything being run or written.

    Raises ValueError as `pretrain` does for data, sizes and parents that do not fit.
    """
    chosen, parent, run = _resolve_inputs(config)
    return _stage(config, build_method(config), _settle_precision(config, run), chosen, parent)


def _resolve_inputs(config: PretrainConfig) -> tuple[Input, InitialWeights, Run]:
    """The data, the initial weights, and the run of that name."""
    check_numbers(config)
    run = named_run(config.storage, config.name)
    chosen = _select_patches(config, _selection(config))
    _check(config, chosen.patches)
    parent = resolve_init(config.init, config.storage, backbone=config.backbone)
    return chosen, parent, run


def _stage(config: PretrainConfig, method: Method, precision: str, chosen: Input, parent: InitialWeights) -> Stage:
    settled = identity(config) | {"recipe": method.recipe_name, "precision": precision}
    return Stage("pretrain", settled, chosen.fingerprint, parent.key)


def _selection(config: PretrainConfig) -> dict[str, Any]:
    return {"split": config.split, "fraction": config.fraction, "seed": config.seed}


def _select_patches(config: PretrainConfig, selection: dict[str, Any]) -> Input:
    sets, cache_bytes = [], cache_limit(config.cache_gib)
    for shards, weight in [(config.data, 1.0), *parse_mix(config.mix)]:
        with open_set(shards, cache_bytes) as reader:
            try:
                ids = select(reader.manifest, **selection)
            except ValueError as error:
                raise ValueError(f"{shards}: {error}") from None
            sets.append(SetInput.of(shards, reader, ids, weight))
    return Input(tuple(sets), config.shuffle_window, cache_bytes)


def _settle_precision(config: PretrainConfig, run: Run) -> str:
    if config.precision != "auto":
        return config.precision
    if run.exists and run.has_work():
        begun = run.record["stage"]["config"].get("precision")
        if begun is not None:  # on whatever hardware it resumes: precision affects the results
            return begun
    return "bf16" if gpus_with_bf16(config.workers, config.gpus_per_worker, name=config.name) else "fp32"


def _health_checks(job: Job) -> HealthChecks:
    return HealthChecks(
        chance_loss=job.method.chance_loss(job.batch_size),
        grace_steps=job.warmup_steps + max(job.steps_per_epoch, job.steps // 10),
    )


def _profile_message(run: Run) -> str:
    path = run.folder / "profile" / TRACE_NAME
    if path.exists():
        return f"profile: {path} (open it in chrome://tracing or ui.perfetto.dev)"
    return f"no profile: it starts after {SKIPPED + WARM_UP} steps, and fewer were left"


def _set_names(config: PretrainConfig) -> str:
    return " + ".join([config.data, *config.mix])


def _check(config: PretrainConfig, patches: int) -> None:
    if config.batch_size > patches:
        raise ValueError(
            f"--batch-size {config.batch_size} is larger than the {patches} selected patches of {_set_names(config)}:"
            " choose a smaller batch, another split or a larger fraction"
        )
    for workers in worker_range(config.workers):
        if config.batch_size % max(1, workers):
            raise ValueError(
                f"--batch-size {config.batch_size} is the global batch and must be divisible by --workers {config.workers}"
            )
        check_micro_batch(config.micro_batch, config.batch_size // max(1, workers))
    if config.shuffle_window is not None and config.shuffle_window < 1:
        raise ValueError(f"--shuffle-window {config.shuffle_window}: give at least 1 shard, or leave it out to shuffle all")


def _finish(run, config, job, stage, seconds, device):
    rows = run.metrics()
    last = rows[-1]
    result = {
        "kind": "pretrain",
        "key": stage.key,
        "chain": job.card["chain"],
        "patches": job.input.patches,
        "steps": job.steps,
        "recipe": describe_recipe(job.method.recipe),
        "final": run.final,
        "nothing_learned_loss": job.method.chance_loss(job.batch_size),
        "patches_per_s": float(np.median([row["patches_per_s"] for row in rows])),
        "data_wait": float(np.median([row["data_wait"] for row in rows])),
        "probe": job.probe.describe() if job.probe else None,
        "init": json.loads((run.folder / "init.json").read_text()),
        "engine": json.loads((run.folder / "engine.json").read_text()),
        "damaged_patches": json.loads(damaged.read_text()) if (damaged := run.folder / DAMAGED_NAME).exists() else [],
        "warnings": _health_checks(job).of_finished(rows),
        "compare_by": job.method.comparison_note,
    }
    if config.private:  # later, its record does not tell where the data are
        with contextlib.suppress(ValueError):
            keep_views(run, config.data)
    run.finish(result, wall_seconds=seconds, device=device)
    report = write_report([run], run.folder / "report.html")
    run.publish()
    print(f"{run.name}: loss {last['loss']:.3f} (chance: {result['nothing_learned_loss']:.3f}), {report}", flush=True)
    if result["compare_by"]:
        print(f"{run.name}: {result['compare_by']}", flush=True)
