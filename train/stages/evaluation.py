"""The evaluation stages: linear protocol, nearest neighbours, fine-tuning, supervised baseline."""

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.recipes import describe_recipe, get_recipe
from pipelines.shard_reader import ShardReader
from sharding.cli import check_numbers
from sharding.folder_names import to_name
from sharding.manifest import fingerprint
from sharding.selection import select
from train.config import EvaluateConfig
from train.records.data import Input, SetInput, cache_limit, open_set
from train.records.init_weights import InitialWeights, StartingPoint, resolve_backbone, resolve_init, view_size
from train.records.places import with_name_of
from train.records.provenance import earlier_stages, find_overlap
from train.records.remote_run import local_storage
from train.records.runs import Run, Stage, find_run, identity, named_run
from train.reporting.gallery import write_gallery
from train.reporting.report_writer import write_report
from train.scoring.bootstrap import FEW_UNITS
from train.stages.feature_cache import FeaturePass, WorkerOptions
from train.stages.finetuning import batch_size_of, check_learning_rate, train_and_predict
from train.stages.label_sets import (
    LabelledSet,
    LabelSplit,
    label_warnings,
    labelled_set,
    split_labels,
    split_rule,
    validation_split,
)
from train.stages.linear_and_knn import evaluate_frozen, init_backbone, split_features
from train.stages.summary import SeedResult, summarise, summary_lines, write_predictions
from train.trainer.logger import write_scalars
from train.trainer.methods import Supervised

TRAINED = ("finetune", "supervised")


def evaluate(config: EvaluateConfig) -> Run:
    """Run the stage, or find it finished. Returns its run.

    Raises ValueError for user errors: data without labels, missing splits, weights that do not fit, a name that is taken.
    """
    with open_set(config.data, cache_limit(config.cache_gib)) as reader:
        return _evaluate(config, reader)


def stage_of(config: EvaluateConfig) -> Stage:
    """The stage that `evaluate` would run. Runs and writes nothing.

    Raises ValueError as `evaluate` does for flags and backbones that do not fit.
    """
    _check(config)
    with open_set(config.data, cache_limit(config.cache_gib)) as reader:
        return _stage(config, _starting_point(config), fingerprint(reader.folder))


def _stage(config: EvaluateConfig, start: StartingPoint, data: str) -> Stage:
    settled = identity(config) | {"image_size": start.image_size, "architecture": start.architecture}
    return Stage(config.mode, settled, data, start.parent.key)


def _evaluate(config: EvaluateConfig, reader: ShardReader) -> Run:
    _check(config)
    known = labelled_set(config, reader)
    splits = [
        (fraction, seed, split_labels(config, reader, known, fraction=fraction, seed=seed))
        for fraction in config.fraction
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    start = _starting_point(config)
    data = SetInput.of(config.data, reader, np.arange(len(reader)))
    run = named_run(config.storage, _default_name(config, start) if config.name is None else config.name)
    stage = _stage(config, start, data.fingerprint)
    if not run.begin(stage, config, _describe_input(config, data, start, splits[0][2])):
        print(f"{run.name}: finished already, {run.place}", flush=True)
        return run
    amounts = " / ".join(f"{len(split.used):,}" for _, seed, split in splits if seed == config.seed)
    print(
        f"{run.name}: {config.mode} of {start.architecture} on {amounts} labels of {config.data}"
        f" ({config.seeds} seed{'s' * (config.seeds > 1)}), tested on {len(splits[0][2].test):,} patches",
        flush=True,
    )
    before = find_overlap(earlier_stages(start.parent), reader, np.unique(np.concatenate([split.test for *_, split in splits])))
    # A single training uses the run's folder, and takes the lock itself.
    with contextlib.nullcontext() if config.mode in TRAINED and len(splits) == 1 else run.locked(stage.key):
        began = time.monotonic()
        if config.mode in TRAINED:
            results, gallery_features, extra, device = _evaluate_by_training(config, known, data, start, run, stage, splits)
        else:
            results, gallery_features, extra, device = _evaluate_frozen_features(config, reader, known, data, start, splits)
        write_predictions(run.folder, reader, known, results)
        first = _shown_result(results)
        test_features, known_features, known_ids = gallery_features(first)
        write_gallery(
            run.folder,
            reader,
            test=first.split.test,
            test_features=test_features,
            known=known_ids,
            known_features=known_features,
            labels=known.labels,
            probabilities=first.probabilities,
            seed=config.seed,
        )
        summary = summarise(known, results, draws=config.draws)
        result = {
            "kind": config.mode,
            "key": stage.key,
            "chain": start.parent.chain,
            "architecture": start.architecture,
            "classes": known.classes,
            "split_rule": split_rule(config),
            "recipe": describe_recipe(get_recipe("eval")),
            "warnings": [
                *before.warnings,
                *label_warnings(known, [split for *_, split in splits]),
                *_small_test_warnings(summary["summary"]),
                *_neighbour_warnings(config, [split for *_, split in splits]),
            ],
            "notes": before.notes,
            **extra,
            **summary,
        }
        write_scalars(run, _scalars(summary["summary"]))
        run.finish(result, wall_seconds=time.monotonic() - began, device=device)
        report = write_report([run], run.folder / "report.html")
        run.publish()
        for line in [*(f"warning: {text}" for text in result["warnings"]), *summary_lines(summary["summary"]), f"{report}"]:
            print(f"{run.name}: {line}", flush=True)
        return run


def _check(config: EvaluateConfig) -> None:
    check_numbers(config)
    if len(set(config.fraction)) < len(config.fraction) or not config.fraction:
        raise ValueError(f"--fraction {' '.join(f'{each:g}' for each in config.fraction)}: give each share once")
    if config.head != "linear" and (config.mode != "linear" or config.protocol == "lbfgs"):
        raise ValueError(f"--head {config.head} is for --mode linear with --protocol adam or sgd: its loss has many minima")
    if config.mode in TRAINED:
        check_learning_rate(config)


def _starting_point(config: EvaluateConfig) -> StartingPoint:
    """Of a supervised baseline, random weights of the architecture that is named, or that the run which is named has."""
    if config.mode == "supervised" and config.backbone != "imagenet":
        run = find_run(config.backbone, config.storage)
        card = resolve_init(config.backbone, config.storage).card if run else {}
        scratch = InitialWeights("scratch", "scratch", [], {})
        return StartingPoint(scratch, card.get("backbone", config.backbone), view_size(config, card))
    return resolve_backbone(config)


def _default_name(config, start):
    # A name such as hf-hub:OWNER/MODEL is not one folder.
    origin = start.parent.run.name if start.parent.run else re.sub(r"[^\w.+-]+", "-", start.architecture)
    seeds = f"seed{config.seed}" if config.seeds == 1 else f"seeds{config.seed}-{config.seed + config.seeds - 1}"
    return to_name(f"{origin}-{config.mode}-{'+'.join(f'{each:g}' for each in config.fraction)}-{seeds}")


def _describe_input(config, data, start, split: LabelSplit) -> dict[str, Any]:
    """What run.json records of the input, for the first fraction and seed."""
    train = Input((replace(data, ids=split.train),), cache_bytes=cache_limit(config.cache_gib))
    trains = config.mode in TRAINED
    return train.describe(
        selection=split.selection,
        recipe=Supervised.recipe_name if trains else "eval",
        image_size=start.image_size,
        seed=config.seed,
        batch_size=batch_size_of(config, split) if trains else None,
    )


def _evaluate_frozen_features(config, reader, known, data, start, splits):
    """The results; a function from a result to the features for its gallery; what else the record says; the device."""
    options = WorkerOptions.from_config(config)
    backbone, init = init_backbone(start, config.seed)
    init = with_name_of(start.parent.source, init) if config.private else init
    what = FeaturePass(backbone, data.shards, data.fingerprint, "eval", start.image_size, cache_limit(config.cache_gib))
    parts = _whole_splits(config, reader, known)
    features = split_features(what, parts, len(reader), options, local_storage(config.storage) / ".features")
    results = evaluate_frozen(config, features, known.labels, len(known.classes), splits)

    def gallery_features(result: SeedResult):
        of = [features.values[features.of(ids)] for ids in (result.split.test, result.split.used)]
        return *of, result.split.used

    return results, gallery_features, {"init": init}, "CPU" if config.workers == 0 else f"{config.workers} workers"


def _whole_splits(config: EvaluateConfig, reader: ShardReader, known: LabelledSet) -> dict[str, np.ndarray]:
    """The patches whose features are computed, which do not depend on the fraction, the seed and the classes."""
    if config.resplit:
        return {"the set": np.flatnonzero(known.labels >= 0)}
    names = [config.split, config.test_split, validation_split(config)]
    return {name: select(reader.manifest, split=name) for name in names if name}


def _evaluate_by_training(config, known, data, start, run, stage, splits):
    """As `_evaluate_frozen_features`. A single training uses the run's folder; several have one each below it."""
    results, features, device = [], {}, ""
    for fraction, seed, split in splits:
        name = f"{100 * fraction:g}%-seed{seed}"
        own = run if len(splits) == 1 else run.cell(name)

        def say(line: str, name: str = name) -> None:
            print(f"{run.name}{'' if len(splits) == 1 else f', {name}'}: {line}", flush=True)

        result, test_features, device = train_and_predict(
            config,
            fraction,
            seed,
            split,
            run=own,
            data=data,
            known=known,
            start=start,
            key=stage.key,
            say=say,
        )
        results.append(result)
        features[fraction, seed] = test_features

    def gallery_features(result: SeedResult):
        # With the trained weights, only the test patches have features, so these are each other's neighbours.
        return features[result.fraction, result.seed], features[result.fraction, result.seed], result.split.test

    return results, gallery_features, {}, device


def _shown_result(results: Sequence[SeedResult]) -> SeedResult:
    """The result that the report's gallery shows: the first seed of the largest fraction."""
    return max(results, key=lambda result: (result.fraction, -result.seed))


def _small_test_warnings(summary) -> list[str]:
    units, unit = summary[0]["units"], summary[0]["unit"]
    if units >= FEW_UNITS:
        return []
    return [f"the test split has only {units} {unit}s, so its intervals are unreliable"]


def _neighbour_warnings(config: EvaluateConfig, splits: Sequence[LabelSplit]) -> list[str]:
    fewest = min(len(split.used) for split in splits)
    if config.mode != "knn" or fewest >= config.neighbours:
        return []
    return [f"where fewer than --neighbours {config.neighbours} labels are used, all of them vote: {fewest} at the least"]


def _scalars(summary) -> dict[str, dict[int, float]]:
    """For TensorBoard: each metric's mean, over the share of labels in percent."""
    names = summary[0]["metrics"]
    return {
        f"test/{name}": {
            round(100 * row["fraction"]): row["metrics"][name]["mean"]
            for row in summary
            if row["metrics"][name]["mean"] is not None
        }
        for name in names
    }
