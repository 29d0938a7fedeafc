"""The stages as functions: what a run leaves, and what it refuses. Without Ray; with it: test_workers."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import yaml

from sharding.packing import build_shards
from train.config import EvaluateConfig, PretrainConfig
from train.evaluation import evaluate
from train.metrics import score
from train.pretraining import pretrain
from train.runs import Run

TINY = "test_resnet"


@pytest.fixture(scope="module")
def settings(tmp_path_factory, small_set):
    return PretrainConfig(
        data=str(small_set),
        name="tiny",
        backbone=TINY,
        image_size=32,
        batch_size=16,
        epochs=1,
        projection_dim=16,
        workers=0,
        threads=1,
        log_every=1,
        storage=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.fixture(scope="module")
def pretrained(settings):
    return pretrain(settings)


def judge(settings, **changes):
    config = EvaluateConfig(
        data=settings.data, backbone="tiny", storage=settings.storage, seed=1, fraction=0.5, epochs=2, log_every=1
    )
    return evaluate(dataclasses.replace(config, **changes))


def test_a_run_leaves_what_the_design_says(settings, pretrained):
    left = {path.name for path in pretrained.folder.iterdir()}
    assert left >= {
        "config.yaml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "backbone.safetensors", "model_card.json",
        "result.json", "report.html",
    }  # fmt: skip
    assert yaml.safe_load((pretrained.folder / "config.yaml").read_text()) == dataclasses.asdict(settings)
    record = pretrained.record
    assert record["status"] == "finished"
    assert record["stage"]["config"]["projection_dim"] == 16
    assert not {"workers", "storage", "data", "name"} & record["stage"]["config"].keys()
    card = json.loads((pretrained.folder / "model_card.json").read_text())
    assert (card["backbone"], card["image_size"], card["chain"]) == (TINY, 32, ["simclr on shards"])
    timm.create_model(TINY, num_classes=0, checkpoint_path=str(pretrained.folder / "backbone.safetensors"))
    steps = [row["step"] for row in pretrained.metrics()]
    assert steps == list(range(1, pretrained.result["steps"] + 1))


def test_a_finished_name_is_not_run_again(settings, pretrained, capsys):
    before = (pretrained.folder / "backbone.safetensors").stat().st_mtime_ns
    pretrain(settings)
    pretrain(dataclasses.replace(settings, threads=2, log_every=5))  # how it is done is no part of what is done
    assert capsys.readouterr().out.count("finished already") == 2
    assert (pretrained.folder / "backbone.safetensors").stat().st_mtime_ns == before


def test_a_name_that_stands_for_another_stage_is_refused(settings, pretrained):
    with pytest.raises(ValueError, match=r"'tiny' is taken by a run with temperature 0\.5 \(now 0\.2\): choose another --name"):
        pretrain(dataclasses.replace(settings, temperature=0.2))


def test_a_run_that_failed_before_its_first_step_leaves_its_name_free(settings):
    settings = dataclasses.replace(settings, name="misspelt")
    with pytest.raises(ValueError, match="resnet81"):
        pretrain(dataclasses.replace(settings, backbone="resnet81"))
    assert pretrain(settings).finished
    with pytest.raises(ValueError, match="'misspelt' is taken by a run with backbone test_resnet"):
        pretrain(dataclasses.replace(settings, backbone="resnet81"))


def test_a_chain_names_its_stages(settings, pretrained):
    run = pretrain(dataclasses.replace(settings, name="second", init="tiny", seed=2))
    assert run.result["chain"] == ["simclr on shards", "simclr on shards"]
    assert run.record["stage"]["parent"] == pretrained.record["key"]
    assert "tensors loaded" in run.result["init"][0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 1000}, "--batch-size 1000 is larger than the"),
        ({"batch_size": 1}, "a contrastive loss needs at least 2"),
        ({"batch_size": 15, "workers": 2}, "must divide by --workers 2"),
        ({"epochs": 0}, "train for at least one"),
        ({"split": "validation"}, "validation"),
        ({"init": "nowhere"}, "nowhere: no run of that name"),
        ({"backbone": "resnet81"}, "resnet81"),
        ({"data": "/nonexistent/shards"}, "/nonexistent/shards"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_leaves_no_run(settings, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain(dataclasses.replace(settings, name="bad", storage=str(tmp_path), **changes))
    assert not Run(tmp_path / "bad").finished


@pytest.mark.parametrize("mode", ["linear", "finetune", "supervised"])
def test_figures_are_those_of_the_kept_predictions(settings, pretrained, mode):
    run = judge(settings, mode=mode)
    rows = pq.read_table(run.folder / "predictions.parquet").to_pydict()
    probabilities = np.array(rows["probabilities"])
    assert probabilities.shape == (run.result["test_patches"], 3)
    assert np.allclose(probabilities.sum(1), 1)
    assert score(probabilities, np.array(rows["label"])) == run.result["metrics"]
    assert len(set(rows["id"])) == len(rows["id"])
    parent = pretrained.record["key"]
    assert run.record["stage"]["parent"] == ("scratch" if mode == "supervised" else parent)
    assert (run.folder / "report.html").exists()


def test_the_judged_slides_are_other_ones(settings, pretrained):
    assert judge(settings).result["warnings"] == []


def test_a_split_by_patch_is_warned_of(settings, pretrained, tmp_path):
    from tests.helpers import breast_files, write_tree

    write_tree(tmp_path / "images", breast_files({"a": 30, "b": 30}))
    build_shards(
        [tmp_path / "images"],
        tmp_path / "leaky",
        layout="{class}/{slide}/{magnification}/{name}",
        group_by="slide",
        split_by="patch",
        split="train=0.5,test=0.5",
    )
    run = judge(settings, data=str(tmp_path / "leaky"), name="leaky")
    assert run.result["warnings"] == ["30 of 30 test patches are of a group (slide or patient) that was learnt from"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"test_split": "train"}, "are both 'train'"),
        ({"backbone": "nowhere"}, "nowhere: no run of that name"),
        ({"fraction": 0.0}, "fraction 0 is out of range"),
        ({"validation": 0.0}, "needs a validation share above 0"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(settings, pretrained, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        judge(settings, name="bad", **changes)


def test_a_set_without_labels_is_one_sentence(settings, pretrained, tmp_path):
    from tests.helpers import breast_files, write_tree

    write_tree(tmp_path / "images", breast_files({"a": 6}))
    build_shards([tmp_path / "images"], tmp_path / "plain", unlabelled=True)
    with pytest.raises(ValueError, match="has 0 classes: judging needs labels of at least two"):
        judge(settings, data=str(tmp_path / "plain"), name="plain")
