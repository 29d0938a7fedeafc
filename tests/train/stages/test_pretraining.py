"""The pretraining stage as a function: what a run leaves, and what it refuses. Without Ray; with it: test_workers."""

import dataclasses
import json
import math
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml

from sharding.manifest import fingerprint
from train.records.runs import Run
from train.stages import pretraining
from train.stages.pretraining import pretrain

TINY = "test_resnet"


def test_a_run_leaves_what_the_design_says(pretrained_config, pretrained):
    left = {path.name for path in pretrained.folder.iterdir()}
    assert left >= {
        "config.yaml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "backbone.safetensors", "model_card.json",
        "result.json", "report.html",
    }  # fmt: skip
    assert yaml.safe_load((pretrained.folder / "config.yaml").read_text()) == dataclasses.asdict(pretrained_config)
    record = pretrained.record
    assert record["status"] == "finished"
    assert record["stage"]["config"]["projection_dim"] == 16
    assert not {"workers", "storage", "data", "name"} & record["stage"]["config"].keys()
    card = json.loads((pretrained.folder / "model_card.json").read_text())
    assert (card["backbone"], card["image_size"], card["chain"]) == (TINY, 32, ["simclr on shards"])
    timm.create_model(TINY, num_classes=0, checkpoint_path=str(pretrained.folder / "backbone.safetensors"))
    steps = [row["step"] for row in pretrained.metrics()]
    assert steps == list(range(1, pretrained.result["steps"] + 1))


def test_the_card_says_what_a_user_of_the_weights_needs(settings, small_set, pretrained):
    card = json.loads((pretrained.folder / "model_card.json").read_text())
    patches = pretrained.result["patches"]
    assert card["data"] == [{"name": "shards", "fingerprint": fingerprint(small_set), "patches": patches, "weight": 1.0}]
    assert (card["key"], card["method"], card["recipe_name"]) == (pretrained.record["key"], "simclr", "simclr")
    assert (card["mean"], card["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    last = pretrained.metrics()[-1]
    assert card["final"] == pretrained.result["final"]
    for name in ("step", "loss", "top1", "alignment", "uniformity", "embedding_std"):
        assert card["final"][name] == last[name]
    assert not {"patches_per_s", "data_wait"} & card["final"].keys()


def test_what_is_settled_is_in_the_key_and_what_came_later_is_not(settings, pretrained):
    """Named here in full: a field more or less, and every finished run would be another stage."""
    assert pretrained.record["stage"]["config"] | {"precision": "fp32"} == {  # bf16 on a GPU
        "method": "simclr", "recipe": "simclr", "backbone": TINY, "split": "train", "fraction": 1.0, "image_size": 32,
        "batch_size": 16, "projection_dim": 16, "temperature": 0.5, "optimizer": "lars", "learning_rate": None,
        "weight_decay": 1e-6, "epochs": 1, "warmup_epochs": 10.0, "precision": "fp32", "seed": 42,
    }  # fmt: skip
    assert pretrain(dataclasses.replace(settings, recipe="simclr")).folder == pretrained.folder  # the same, said aloud


def test_what_a_run_starts_from_is_said(settings, pretrained, capsys):
    pretrain(dataclasses.replace(settings, name="told", init="tiny", learning_rate=5e-6, schedule="constant", warmup_epochs=0))
    said = capsys.readouterr().out
    for words in (
        f"told: {pretrained.folder}: ", "tensors loaded", "told: head: random weights", "told: weights: ", "weight decay 1e-06",
        "told: biases and norms: ", "told: lars: learning rate 5e-06, constant",
    ):  # fmt: skip
        assert words in said
    assert {row["learning_rate"] for row in Run(pretrained.folder.with_name("told")).metrics()} == {5e-6}


@pytest.mark.parametrize("changes", [{"init": "imagenet"}, {"backbone": "resnet81"}, {"projection_dim": 0}])
def test_a_mistake_shows_before_ray_is_started(settings, changes, monkeypatch):
    def no_ray(*_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(pretraining, "gpus_with_bf16", no_ray)
    monkeypatch.setattr(pretraining, "run_job", no_ray)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", settings.storage)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    changes = {"backbone": "resnet18"} | changes
    with pytest.raises(ValueError, match=r"cannot be downloaded .*--init PATH|resnet81|must be at least 1"):
        pretrain(dataclasses.replace(settings, name="early", workers=1, **changes))
    assert pauses == []  # the hub is asked once


def test_rotations_are_pretrained_on_and_gone_on_from(settings):
    method = "rotnet-jitter"
    run = pretrain(dataclasses.replace(settings, name=method, method=method, epochs=2))
    assert run.result["nothing_learned_loss"] == pytest.approx(math.log(4))
    assert 0 <= run.result["final"]["rotation_accuracy"] <= 1
    assert (run.result["chain"], run.record["stage"]["config"]["recipe"]) == ([f"{method} on shards"], method)
    assert run.record["input"]["recipe"] == method
    assert run.result["recipe"]["turns"] == "by view" and (run.folder / "report.html").exists()
    second = pretrain(dataclasses.replace(settings, name=f"{method} and simclr", init=method))
    assert second.result["chain"] == [f"{method} on shards", "simclr on shards"]


@pytest.mark.parametrize("changes", [{"projection_layers": 3, "projection_dim": 64}, {"lr_rule": "sqrt"}])
def test_options_reach_the_run_and_its_key(settings, pretrained, changes):
    run = pretrain(dataclasses.replace(settings, name="-".join(changes), **changes))
    stage = run.record["stage"]
    assert {name: stage["config"][name] for name in changes} == changes and run.record["key"] != pretrained.record["key"]
    head = torch.load(run.folder / "head.pt", weights_only=True)
    if "projection_layers" in changes:
        assert len([tensor for tensor in head.values() if tensor.ndim == 2]) == 3 and head["6.weight"].shape[0] == 64
    else:
        assert max(row["learning_rate"] for row in run.metrics()) == pytest.approx(0.075 * 4, rel=0.1)


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
        ({"batch_size": 1}, "--batch-size 1: give at least 2"),
        ({"batch_size": 15, "workers": 2}, "must be divisible by --workers 2"),
        ({"epochs": 0}, "--epochs 0: give at least 1"),
        ({"weight_decay": -1e-6}, "--weight-decay -1e-06: give at least 0"),
        ({"weight_decay": float("inf")}, "--weight-decay inf: give at least 0"),
        ({"warmup_epochs": -1.0}, "--warmup-epochs -1: give at least 0"),
        ({"image_size": 0}, "--image-size 0: give at least 1"),
        ({"log_every": 0}, "--log-every 0: give at least 1"),
        ({"probe_every": -1}, "--probe-every -1: give at least 0"),
        ({"probe_patches": 0}, "--probe-patches 0: give at least 1"),
        ({"threads": -1}, "--threads -1: give at least 0"),
        ({"seed": -1}, "--seed -1: give at least 0"),
        ({"name": "../outside"}, "--name '../outside' has the character '/'"),
        ({"name": ""}, "--name '' is empty"),
        ({"split": "validation"}, "validation"),
        ({"init": "nowhere"}, "nowhere: no run of that name"),
        ({"backbone": "resnet81"}, "resnet81"),
        ({"data": "/nonexistent/shards"}, "/nonexistent/shards"),
        ({"recipe": "rotnet"}, "--recipe rotnet does not suit --method simclr"),
        ({"method": "rotnet", "recipe": "simclr-mild"}, "leave it out, or give rotnet or rotnet-jitter"),
        ({"learning_rate": 0.0}, "--learning-rate 0 must be above 0"),
        ({"lr_rule": "sqrt", "optimizer": "adam"}, "--lr-rule sqrt is for the default rate of lars and sgd"),
        ({"projection_dim": 0}, "projection_dim 0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_leaves_no_run(settings, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain(dataclasses.replace(settings, **({"name": "bad", "storage": str(tmp_path)} | changes)))
    assert not Run(tmp_path / "bad").finished


def test_a_name_taken_before_the_first_step_is_not_trained_under(settings, monkeypatch):
    """Another command begins another stage under it after this one has, and before this one's worker has the lock."""
    run_job = pretraining.run_job

    def taken_first(job, *resources):
        other = dataclasses.replace(settings, name="contested", seed=7)
        assert Run(job.folder).begin(pretraining.stage_of(other), other, {})
        return run_job(job, *resources)

    monkeypatch.setattr(pretraining, "run_job", taken_first)
    with pytest.raises(ValueError, match="'contested' was taken by another command, with other settings"):
        pretrain(dataclasses.replace(settings, name="contested"))
    run = Run(Path(settings.storage) / "contested")
    assert (run.record["seed"], run.config["seed"], run.has_work()) == (7, 7, False)
