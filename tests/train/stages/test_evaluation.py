"""The judging stages as functions: their figures, seeds and fractions, splits, warnings, and what they refuse."""

import dataclasses
import functools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.weights import weights_hash
from sharding.manifest import read_manifest
from sharding.packing import build_shards
from sharding.selection import select
from tests.helpers import breast_files, write_tree
from train.cluster import launcher
from train.config import EvaluateConfig
from train.records import runs
from train.scoring.metrics import score
from train.stages import evaluation, feature_cache
from train.stages.evaluation import evaluate
from train.stages.finetuning import batch_size_of
from train.stages.label_sets import LabelSplit
from train.stages.pretraining import pretrain

TINY = "test_resnet"
FROZEN = {"backbone": "scratch", "architecture": TINY, "image_size": 32}


def judge(settings, **changes):
    config = EvaluateConfig(
        data=settings.data,
        backbone="tiny",
        storage=settings.storage,
        seed=1,
        fraction=[0.5],
        epochs=2,
        log_every=1,
        threads=1,
        draws=50,
    )
    return evaluate(dataclasses.replace(config, **changes))


def predictions_of(run):
    rows = pq.read_table(run.folder / "predictions.parquet").to_pydict()
    return {name: np.array(values, dtype=object if name in ("key", "group") else None) for name, values in rows.items()}


@pytest.mark.parametrize("mode", ["linear", "knn", "finetune", "supervised"])
def test_figures_are_those_of_the_kept_predictions(settings, pretrained, small_set, mode):
    run = judge(settings, mode=mode)
    rows, (cell,) = predictions_of(run), run.result["cells"]
    np.testing.assert_allclose(rows["probabilities"].sum(1), 1)
    assert score(rows["probabilities"], rows["label"]) == cell["metrics"]
    manifest = read_manifest(small_set)
    np.testing.assert_array_equal(rows["id"], select(manifest, split="test"))  # each once, in order
    assert rows["group"].tolist() == manifest["group"].take(rows["id"]).to_pylist()
    labels = len(select(manifest, split="train", fraction=0.5, seed=1))
    assert (cell["fraction"], cell["seed"], cell["labels"]) == (0.5, 1, labels)
    parent = pretrained.record["key"]
    assert run.record["stage"]["parent"] == ("scratch" if mode == "supervised" else parent)
    for name in ("report.html", "embedding_map.parquet", "gallery.json", "thumbnails.parquet"):
        assert (run.folder / name).exists()


def test_several_seeds_and_fractions_are_what_each_is_alone(settings, pretrained):
    """And their mean, deviation and order of intervals by hand."""
    both = judge(settings, fraction=[0.25, 1.0], seeds=2, name="both")
    cells = {(cell["fraction"], cell["seed"]): cell for cell in both.result["cells"]}
    assert [*cells] == [(0.25, 1), (0.25, 2), (1.0, 1), (1.0, 2)]
    alone = judge(settings, fraction=[0.25], seed=2, name="alone").result["cells"][0]
    assert alone == cells[0.25, 2]
    rows = predictions_of(both)
    for (fraction, seed), cell in cells.items():
        of = (rows["fraction"] == fraction) & (rows["seed"] == seed)
        assert score(rows["probabilities"][of], rows["label"][of]) == cell["metrics"]
    for row in both.result["summary"]:
        values = [cells[row["fraction"], seed]["metrics"]["log_loss"] for seed in (1, 2)]
        figure = row["metrics"]["log_loss"]
        assert figure["mean"] == pytest.approx(np.mean(values))
        assert figure["std"] == pytest.approx(np.std(values, ddof=1))
        assert figure["low"] <= figure["mean"] <= figure["high"]
        assert (row["seeds"], row["unit"]) == (2, "group")
        assert row["units"] == len(set(rows["group"]))
    board = EventAccumulator(str(both.folder / "tensorboard")).Reload()
    logged = {event.step: event.value for event in board.Scalars("test/accuracy")}
    assert logged == pytest.approx({25: both.result["summary"][0]["metrics"]["accuracy"]["mean"],
                                    100: both.result["summary"][1]["metrics"]["accuracy"]["mean"]})  # fmt: skip


def test_trained_cells_are_what_each_is_alone(settings, pretrained):
    both = judge(settings, mode="finetune", fraction=[0.5, 1.0], name="both tuned")
    alone = judge(settings, mode="finetune", fraction=[1.0], name="alone tuned")
    assert both.result["cells"][1] == alone.result["cells"][0]
    assert sorted(path.name for path in (both.folder / "cells").iterdir()) == ["100%-seed1", "50%-seed1"]
    assert (alone.folder / "backbone.safetensors").exists()


def test_what_was_judged_is_not_judged_again(settings, pretrained, monkeypatch):
    """A run of two cells that was cut off in the second."""
    real, trained = evaluation.train_and_predict, []

    def cut_off(config, fraction, *rest, **others):
        if fraction == 1.0 and not trained:
            trained.append(fraction)
            raise KeyboardInterrupt
        return real(config, fraction, *rest, **others)

    monkeypatch.setattr(evaluation, "train_and_predict", cut_off)
    given = {"mode": "finetune", "fraction": [0.5, 1.0], "name": "cut off"}
    with pytest.raises(KeyboardInterrupt):
        judge(settings, **given)
    first = settings.storage + "/cut off/cells/50%-seed1/test_features.npy"
    before = np.load(first).tobytes()
    monkeypatch.setattr("train.stages.finetuning.run_job", lambda job, *rest: _only(job, "100%-seed1", rest))
    run = judge(settings, **given)
    assert np.load(first).tobytes() == before
    assert [cell["fraction"] for cell in run.result["cells"]] == [0.5, 1.0]


def _only(job, name, rest):
    from train.cluster.launcher import run_job

    assert job.folder.name == name
    return run_job(job, *rest)


def test_an_evaluation_keeps_other_commands_from_its_name(settings, pretrained, monkeypatch):
    """Also one of frozen features, which takes no steps, and so has nothing to lose until it is finished."""
    computed, refused = evaluation.split_features, []

    def contested(*arguments):
        monkeypatch.setattr(evaluation, "split_features", computed)
        try:
            judge(settings, name="contested", seed=9)
        except ValueError as error:
            refused.append(str(error))
        return computed(*arguments)

    monkeypatch.setattr(evaluation, "split_features", contested)
    monkeypatch.setattr(runs, "locked_run", functools.partial(runs.locked_run, timeout_s=0.1))
    run = judge(settings, name="contested")
    assert refused == ["contested is being trained by another process: wait for it or end it, or choose another --name"]
    assert run.record["key"] == run.result["key"] and run.record["seed"] == 1


@pytest.mark.parametrize("protocol", ["adam", "sgd"])
def test_published_protocols(settings, pretrained, protocol):
    run = judge(settings, protocol=protocol, fraction=[1.0], seeds=2, name=protocol)
    for cell in run.result["cells"]:
        assert cell["fit"]["protocol"]["name"] == protocol and 1 <= cell["fit"]["best_epoch"] <= cell["fit"]["epochs_run"] <= 100
    wider = judge(settings, protocol=protocol, head="mlp", fraction=[1.0], name=f"{protocol} mlp")
    assert wider.result["cells"][0]["fit"]["protocol"]["head"] == "mlp"


def test_the_backbone_is_the_same_afterwards(settings, pretrained, monkeypatch):
    seen = []
    real = evaluation.init_backbone

    def kept(*given):
        backbone, lines = real(*given)
        seen.append((backbone, weights_hash(backbone)))
        return backbone, lines

    monkeypatch.setattr(evaluation, "init_backbone", kept)
    judge(settings, name="unchanged", image_size=24)  # other features than are in the cache
    ((backbone, before),) = seen
    assert weights_hash(backbone) == before and not backbone.training


def test_features_are_computed_once_for_all_fractions_and_seeds(settings, pretrained, monkeypatch):
    judge(settings, name="first of all")
    monkeypatch.setattr(feature_cache, "compute_features", lambda *_, **__: pytest.fail("computed again"))
    judge(settings, fraction=[0.3, 0.7], seeds=3, seed=11, name="from the cache")


@pytest.mark.parametrize("group_aware", [True, False])
def test_a_set_cut_anew(settings, pretrained, small_set, group_aware):
    """70/15/15 of the whole set: the parts named in the shares are used as they are called."""
    shares = "train=0.6,validation=0.2,test=0.2"
    run = judge(settings, resplit=shares, group_aware=group_aware, fraction=[1.0], name=f"anew {group_aware}")
    rows, manifest = predictions_of(run), read_manifest(small_set)
    test = select(manifest, resplit=shares, split="test", group_aware=group_aware, seed=1)
    np.testing.assert_array_equal(rows["id"], test)
    rule = run.result["split_rule"]
    assert shares in rule and "validated on split 'validation'" in rule
    assert ("whole groups on one side" in rule) is group_aware
    of_leaks = "test patches are of a group (slide or patient) that was trained on"
    leaks = [text for text in run.result["warnings"] if of_leaks in text]
    assert bool(leaks) is not group_aware


def test_classes_that_are_left_out(settings, pretrained, small_set):
    names = json.loads((small_set / "dataset.json").read_text())["classes"]
    run = judge(settings, leave_out=[names[0]], mode="finetune", name="two of three")
    assert run.result["classes"] == names[1:]
    rows, manifest = predictions_of(run), read_manifest(small_set)
    truth = [manifest["class"][int(patch)].as_py() for patch in rows["id"]]
    assert truth == [names[1:][label] for label in rows["label"]]
    assert rows["probabilities"].shape[1] == 2


def test_a_cap_and_a_seed_choose_the_labels(settings, pretrained, small_set):
    run = judge(settings, cap=4, fraction=[1.0], seeds=2, name="capped")
    assert [cell["labels"] for cell in run.result["cells"]] == [12, 12]
    assert "at most 4 labels per class" in run.result["split_rule"]
    first, second = (select(read_manifest(small_set), split="train", cap=4, seed=seed) for seed in (1, 2))
    assert set(first) != set(second)


def test_early_stopping_keeps_the_best_weights(settings, pretrained):
    """A rate at which training falls apart: the first epochs are the best, and no more than the patience follow."""
    run = judge(
        settings, mode="finetune", learning_rate=0.1, schedule="constant", epochs=12, patience=2, fraction=[1.0], name="stopped"
    )
    rows = [row for row in run.metrics() if "validation_loss" in row]
    losses = [row["validation_loss"] for row in rows]
    fit = run.result["cells"][0]["fit"]
    best = int(np.nanargmin([np.nan if loss is None else loss for loss in losses]))
    assert len(rows) == best + 3 < 12
    assert (fit["best_epoch"], fit["epochs_run"]) == (best + 1, len(rows))
    # The weights that were kept are those of the best epoch: trained for so long, and no further, they are the same.
    short = judge(
        settings,
        mode="finetune",
        learning_rate=0.1,
        schedule="constant",
        epochs=best + 1,
        patience=0,
        warmup_epochs=0.0,
        fraction=[1.0],
        name="short",
    )
    same = judge(
        settings,
        mode="finetune",
        learning_rate=0.1,
        schedule="constant",
        epochs=12,
        patience=2,
        warmup_epochs=0.0,
        fraction=[1.0],
        name="stopped too",
    )
    if same.result["cells"][0]["fit"]["best_epoch"] == best + 1:
        assert short.result["cells"][0]["metrics"] == same.result["cells"][0]["metrics"]


def test_without_validation_all_labels_are_learnt_from(settings, pretrained):
    run = judge(settings, mode="finetune", validation=0.0, fraction=[1.0], name="all labels")
    assert not any("validation_loss" in row for row in run.metrics())
    assert "validated on" not in run.result["split_rule"]


def test_early_stopping_goes_on_where_it_was(settings, pretrained, monkeypatch):
    """Cut off after an epoch, on the way to an early end: the same epochs, weights and predictions."""
    given = {"mode": "finetune", "learning_rate": 0.05, "schedule": "constant", "epochs": 8, "patience": 2, "fraction": [1.0]}
    whole = judge(settings, **given, name="whole")

    class CutOff(Exception):
        pass

    saves = []

    real = launcher.single_worker

    def interrupted(*where, **others):
        worker = real(*where, **others)
        real_save = worker.store.save

        def save(step, write):
            real_save(step, write)
            saves.append(step)
            if len(saves) == 2:
                raise CutOff

        worker.store.save = save
        return worker

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "single_worker", interrupted)
        with pytest.raises(CutOff):
            judge(settings, **given, name="in parts")
    parts = judge(settings, **given, name="in parts")
    assert [row.get("validation_loss") for row in parts.metrics()] == [row.get("validation_loss") for row in whole.metrics()]
    assert parts.result["cells"][0]["metrics"] == whole.result["cells"][0]["metrics"]


def test_rotations_are_judged_with_a_fixed_rate(settings):
    pretrain(dataclasses.replace(settings, name="rotnet", method="rotnet"))
    judged = judge(settings, mode="finetune", backbone="rotnet", learning_rate=5e-6, schedule="constant", warmup_epochs=0.0)
    assert {row["learning_rate"] for row in judged.metrics()} == {5e-6}


def test_the_judged_slides_are_other_ones(settings, pretrained):
    assert [text for text in judge(settings).result["warnings"] if "group" in text and "intervals" not in text] == []


def test_few_slides_are_warned_of(settings, pretrained):
    run = judge(settings)
    units = run.result["summary"][0]["units"]
    assert units < 10 and f"the test split has only {units} groups, so its intervals are unreliable" in run.result["warnings"]


def test_a_split_by_patch_is_warned_of(settings, pretrained, tmp_path):
    write_tree(tmp_path / "images", breast_files({"a": 30, "b": 30}))
    build_shards(
        [tmp_path / "images"],
        tmp_path / "leaky",
        layout="{class}/{slide}/{magnification}/{name}",
        group_by="slide",
        split_by="patch",
        split="train=0.5,test=0.5",
    )
    # From random weights: the run `tiny` has seen some of these drawn images in its own set.
    run = judge(settings, data=str(tmp_path / "leaky"), name="leaky", **FROZEN)
    assert run.result["warnings"][0] == "30 of 30 test patches are of a group (slide or patient) that was trained on"


def test_classes_of_unlike_size_are_warned_of(settings, tmp_path):
    write_tree(tmp_path / "images", breast_files({"many": 80, "few": 8}))
    layout = "{class}/{slide}/{magnification}/{name}"
    build_shards([tmp_path / "images"], tmp_path / "set", layout=layout, split_by="patch", split="train=0.5,test=0.5")
    run = judge(settings, data=str(tmp_path / "set"), name="unlike", fraction=[1.0], **FROZEN)
    assert any("40 patches of many and 4 of few, so that accuracy is misleading" in text for text in run.result["warnings"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"test_split": "train"}, "'train' is given for two of --split, --test-split"),
        ({"validation_split": "test"}, "'test' is given for two of"),
        ({"backbone": "nowhere"}, "nowhere: no run of that name"),
        ({"fraction": [0.0]}, "fraction 0 is out of range"),
        ({"fraction": [0.5, 0.5]}, "--fraction 0.5 0.5: give each share once"),
        ({"validation": 0.0}, "--validation 0 leaves no validation part"),
        ({"seeds": 0}, "--seeds 0: give at least 1"),
        ({"draws": 0}, "--draws 0: give at least 1"),
        ({"head": "mlp"}, "--head mlp is for --mode linear with --protocol adam or sgd"),
        ({"mode": "knn", "neighbours": 0}, "--neighbours 0"),
        ({"classes": ["carcinoma"]}, "there is no class 'carcinoma'"),
        ({"classes": ["benign"]}, "has 1 class: an evaluation needs labels of at least two"),
        ({"resplit": "train=0.5,rest=0.5"}, "there is no split 'test'; resplit makes train, rest"),
        ({"resplit": "train=0.5"}, "shares sum to 0.5, not to 1"),
        ({"mode": "finetune", "patience": -1}, "--patience -1"),
        ({"mode": "finetune", "epochs": 0}, "--epochs 0"),
        ({"mode": "supervised", "batch_size": 1}, "--batch-size 1: give at least 2"),
        ({"mode": "finetune", "learning_rate": float("inf")}, "--learning-rate inf: give a rate above 0"),
        ({"mode": "finetune", "weight_decay": -1.0}, "--weight-decay -1: give at least 0"),
        ({"image_size": 0}, "--image-size 0: give at least 1"),
        ({"name": ".."}, "--name '..': a name neither begins with a dot"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(settings, pretrained, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        judge(settings, **({"name": "bad"} | changes))


def test_a_single_patch_to_train_on_is_one_sentence():
    """Batch norm has no statistics of one."""
    ids = [np.arange(count) for count in (2, 1, 1, 5)]
    with pytest.raises(ValueError, match="1 patch is left to train on: give a larger --fraction or --cap, or less --validation"):
        batch_size_of(EvaluateConfig(data="d"), LabelSplit(*ids, selection={}))


def test_fewer_labels_than_neighbours_are_said(settings, pretrained):
    run = judge(settings, mode="knn", name="few", cap=4, neighbours=20, seeds=1)
    assert "where fewer than --neighbours 20 labels are used, all of them vote: 6 at the least" in run.result["warnings"]


def test_a_set_without_labels_is_one_sentence(settings, pretrained, tmp_path):
    write_tree(tmp_path / "images", breast_files({"a": 6}))
    build_shards([tmp_path / "images"], tmp_path / "plain", unlabelled=True)
    with pytest.raises(ValueError, match="has 0 classes: an evaluation needs labels of at least two"):
        judge(settings, data=str(tmp_path / "plain"), name="plain")


def test_two_workers_see_each_test_patch_once(ray_here, settings, pretrained, monkeypatch):
    """In small parts, of which no worker has as many as another. Each worker imports torch and DALI for 8 s."""
    monkeypatch.setattr(feature_cache, "PART", 10)
    run = judge(settings, name="by two", workers=2, image_size=27)
    apart = settings.storage + "/apart"  # the features of `run` are not in its cache
    alone = judge(settings, name="alone", image_size=27, storage=apart, backbone=str(pretrained.folder))
    rows, others = predictions_of(run), predictions_of(alone)
    np.testing.assert_array_equal(rows["id"], others["id"])
    assert len(set(rows["id"])) == len(rows["id"]) == run.result["cells"][0]["test_patches"]
    np.testing.assert_allclose(rows["probabilities"], others["probabilities"], atol=1e-5)
