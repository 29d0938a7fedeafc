"""The evaluation stages: linear protocol, nearest neighbours, fine-tuning, supervised baseline."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.recipes import describe_recipe, get_recipe
from pipelines.shard_reader import ShardReader
from sharding.manifest import fingerprint
from sharding.selection import select
from train.config import EvaluateConfig
from train.records.data import Input, SetInput, gib, open_set
from train.records.init_weights import InitialWeights, resolve_init
from train.records.provenance import learnt_before, look_for
from train.records.remote_run import local_storage
from train.records.runs import Run, Stage, find_run, identity, open_run
from train.reporting.gallery import leave_exhibits
from train.reporting.report_writer import write_report
from train.scoring.bootstrap import FEW_UNITS
from train.stages.feature_cache import FeaturePass, On
from train.stages.finetuning import Start, batch_size_of, check_training, train_cell
from train.stages.frozen import built_backbone, features_of, judge_frozen
from train.stages.label_sets import LabelledSet, Labels, choose_labels, labelled_set, split_rule, validation_split, warnings_of
from train.stages.summary import Cell, judged, summary_lines, write_predictions
from train.trainer.logger import write_scalars
from train.trainer.methods import Supervised

TRAINED = ("finetune", "supervised")


def evaluate(config: EvaluateConfig) -> Run:
    """Run the stage, or find it finished. Returns its run.

    Raises ValueError for what the user can put right: data without labels, splits that are not there, weights that do not
    fit, a name that is taken.
    """
    with open_set(config.data, gib(config.cache_gib)) as reader:
        return _evaluate(config, reader)


def stage_of(config: EvaluateConfig) -> Stage:
    """What `evaluate` would run, without anything being run or written.

    Raises ValueError as `evaluate` does for flags and backbones that do not fit.
    """
    _check(config)
    with open_set(config.data, gib(config.cache_gib)) as reader:
        return _stage(config, _start(config), fingerprint(reader.folder))


def _stage(config: EvaluateConfig, start: Start, data: str) -> Stage:
    settled = identity(config) | {"image_size": start.image_size, "architecture": start.architecture}
    return Stage(config.mode, settled, data, start.parent.key)


def _evaluate(config: EvaluateConfig, reader: ShardReader) -> Run:
    _check(config)
    known = labelled_set(config, reader)
    chosen = [
        (fraction, seed, choose_labels(config, reader, known, fraction=fraction, seed=seed))
        for fraction in config.fraction
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    start = _start(config)
    data = SetInput.of(config.data, reader, np.arange(len(reader)))
    run = open_run(config.storage, config.name or _default_name(config, start))
    stage = _stage(config, start, data.fingerprint)
    if not run.begin(stage, config, _reads(config, data, start, chosen[0][2])):
        print(f"{run.name}: finished already, {run.place}", flush=True)
        return run
    amounts = " / ".join(f"{len(each.used):,}" for _, seed, each in chosen if seed == config.seed)
    print(
        f"{run.name}: {config.mode} of {start.architecture} on {amounts} labels of {config.data}"
        f" ({config.seeds} seed{'s' * (config.seeds > 1)}), judged on {len(chosen[0][2].test):,} patches",
        flush=True,
    )
    before = look_for(learnt_before(start.parent), reader, np.unique(np.concatenate([each.test for *_, each in chosen])))
    began = time.monotonic()
    if config.mode in TRAINED:
        cells, shown, extra, device = _trained(config, known, data, start, run, stage, chosen)
    else:
        cells, shown, extra, device = _frozen(config, reader, known, data, start, chosen)
    write_predictions(run.folder, reader, known, cells)
    first = _first_of_most(cells)
    test_features, known_features, known_ids = shown(first)
    leave_exhibits(
        run.folder,
        reader,
        test=first.labels.test,
        test_features=test_features,
        known=known_ids,
        known_features=known_features,
        labels=known.labels,
        probabilities=first.probabilities,
        seed=config.seed,
    )
    figures = judged(known, cells, draws=config.draws)
    result = {
        "kind": config.mode,
        "key": stage.key,
        "chain": start.parent.chain,
        "architecture": start.architecture,
        "classes": known.classes,
        "split_rule": split_rule(config),
        "recipe": describe_recipe(get_recipe("eval")),
        "warnings": [*before.warnings, *warnings_of(known, [each for *_, each in chosen]), *_few(figures["summary"])],
        "notes": before.notes,
        **extra,
        **figures,
    }
    write_scalars(run, _scalars(figures["summary"]))
    run.finish(result, wall_seconds=time.monotonic() - began, device=device)
    report = write_report([run], run.folder / "report.html")
    run.publish()
    for line in [*(f"warning: {text}" for text in result["warnings"]), *summary_lines(figures["summary"]), f"{report}"]:
        print(f"{run.name}: {line}", flush=True)
    return run


def _check(config: EvaluateConfig) -> None:
    if config.seeds < 1:
        raise ValueError(f"--seeds {config.seeds}: give at least 1")
    if len(set(config.fraction)) < len(config.fraction) or not config.fraction:
        raise ValueError(f"--fraction {' '.join(f'{each:g}' for each in config.fraction)}: give each share once")
    if config.draws < 1:
        raise ValueError(f"--draws {config.draws}: give at least 1")
    if config.neighbours < 1:
        raise ValueError(f"--neighbours {config.neighbours}: give at least 1")
    if config.head != "linear" and (config.mode != "linear" or config.protocol == "lbfgs"):
        raise ValueError(f"--head {config.head} is for --mode linear with --protocol adam or sgd: its loss has many minima")
    if config.mode in TRAINED:
        check_training(config)


def _start(config: EvaluateConfig) -> Start:
    """What the weights come from, the architecture and the image size."""
    if config.mode == "supervised" and config.backbone != "imagenet":
        run = find_run(config.backbone, config.storage)
        card = resolve_init(config.backbone, config.storage).card if run else {}
        return Start(InitialWeights("scratch", "scratch", [], {}), card.get("backbone", config.backbone), _size(config, card))
    parent = resolve_init(config.backbone, config.storage)
    architecture = config.architecture or parent.card.get("backbone")
    if architecture is None:
        raise ValueError(f"{config.backbone} has no model card that says what it is: give --architecture, a timm model name")
    return Start(parent, architecture, _size(config, parent.card))


def _size(config, card):
    return config.image_size or card.get("image_size") or 224


def _default_name(config, start):
    # A name such as hf-hub:OWNER/MODEL is not one folder.
    origin = start.parent.run.name if start.parent.run else re.sub(r"[^\w.+-]+", "-", start.architecture)
    seeds = f"seed{config.seed}" if config.seeds == 1 else f"seeds{config.seed}-{config.seed + config.seeds - 1}"
    return f"{origin}-{config.mode}-{'+'.join(f'{each:g}' for each in config.fraction)}-{seeds}"


def _reads(config, data, start, chosen: Labels) -> dict[str, Any]:
    """What run.json says of the first cell's input."""
    learnt = Input((replace(data, ids=chosen.learnt),), cache_bytes=gib(config.cache_gib))
    trains = config.mode in TRAINED
    return learnt.describe(
        selection=chosen.selection,
        recipe=Supervised.recipe_name if trains else "eval",
        image_size=start.image_size,
        seed=config.seed,
        batch_size=batch_size_of(config, chosen) if trains else None,
    )


def _frozen(config, reader, known, data, start, chosen):
    """The cells; what is shown of one; what the result says besides; the device."""
    on = On(config.workers, config.gpus_per_worker, config.cpus_per_worker, config.threads or None)
    backbone, init = built_backbone(start.architecture, start.image_size, start.parent.source, config.seed)
    what = FeaturePass(backbone, data.shards, data.fingerprint, "eval", start.image_size, gib(config.cache_gib))
    splits = _whole_splits(config, reader, known)
    features = features_of(what, splits, len(reader), on, local_storage(config.storage) / ".features")
    cells = judge_frozen(config, features, known.labels, len(known.classes), chosen)

    def shown(cell: Cell):
        of = [features.values[features.of(ids)] for ids in (cell.labels.test, cell.labels.used)]
        return *of, cell.labels.used

    return cells, shown, {"init": init}, "CPU" if on.workers == 0 else f"{on.workers} workers"


def _whole_splits(config: EvaluateConfig, reader: ShardReader, known: LabelledSet) -> dict[str, np.ndarray]:
    """Whatever the fraction, the seed and the classes: what features are computed of."""
    if config.resplit:
        return {"the set": np.flatnonzero(known.labels >= 0)}
    names = [config.split, config.test_split, validation_split(config)]
    return {name: select(reader.manifest, split=name) for name in names if name}


def _trained(config, known, data, start, run, stage, chosen):
    """As `_frozen`. One cell trains in the run's folder, several each in one of their own below it."""
    cells, features, device = [], {}, ""
    for fraction, seed, labels in chosen:
        name = f"{100 * fraction:g}%-seed{seed}"
        own = run if len(chosen) == 1 else run.cell(name)

        def say(line: str, name: str = name) -> None:
            print(f"{run.name}{'' if len(chosen) == 1 else f', {name}'}: {line}", flush=True)

        cell, test_features, device = train_cell(
            config,
            fraction,
            seed,
            labels,
            run=own,
            data=data,
            known=known,
            start=start,
            key=stage.key,
            say=say,
        )
        cells.append(cell)
        features[fraction, seed] = test_features

    def shown(cell: Cell):
        # Of the trained weights there are features of the test patches alone, so these are each other's neighbours.
        return features[cell.fraction, cell.seed], features[cell.fraction, cell.seed], cell.labels.test

    return cells, shown, {}, device


def _first_of_most(cells: Sequence[Cell]) -> Cell:
    """What the report's pictures are of: the first seed of the largest fraction."""
    return max(cells, key=lambda cell: (cell.fraction, -cell.seed))


def _few(summary) -> list[str]:
    units, unit = summary[0]["units"], summary[0]["unit"]
    if units >= FEW_UNITS:
        return []
    return [f"the test has {units} {unit}s: intervals over so few say little"]


def _scalars(summary) -> dict[str, dict[int, float]]:
    """For TensorBoard: each figure's mean, over the share of labels in percent."""
    names = summary[0]["metrics"]
    return {
        f"test/{name}": {
            round(100 * row["fraction"]): row["metrics"][name]["mean"]
            for row in summary
            if row["metrics"][name]["mean"] is not None
        }
        for name in names
    }
