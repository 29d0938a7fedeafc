"""What pretraining settles for itself, and what it says and keeps of a run. Without Ray."""

import dataclasses
import functools
import math

import pytest
import torch

from pipelines.loader import ViewLoader
from sharding.cli import parse
from tests.helpers import tiny_pretraining
from train.cluster import ray_cluster
from train.cluster.ray_cluster import gpus_with_bf16
from train.config import PretrainConfig
from train.records.runs import Run
from train.stages import pretraining
from train.stages.pretraining import pretrain
from train.trainer import loop


@pytest.fixture(autouse=True)
def _reference_views(monkeypatch):
    """The same views by torchvision: DALI's graph with colours takes seconds to compile, for every one of the runs here."""
    monkeypatch.setattr(loop, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))


@pytest.fixture
def config(tmp_path, small_set):
    return tiny_pretraining(small_set, tmp_path, recipe="simclr-mild", probe_every=0)


def with_gpus(monkeypatch, found):
    asked = []

    def answer(workers, gpus_per_worker, *, name):
        asked.append(workers)
        return found

    monkeypatch.setattr(pretraining, "gpus_with_bf16", answer)
    return asked


def precision_of(run):
    return run.record["stage"]["config"]["precision"]


def test_precision_is_settled_by_the_device_and_stays(config, monkeypatch):
    asked = with_gpus(monkeypatch, False)
    run = pretrain(config)
    assert (precision_of(run), run.config["precision"], run.result["engine"]["precision"]) == ("fp32", "auto", "fp32")
    assert pretrain(dataclasses.replace(config, precision="fp32")).record["key"] == run.record["key"]  # finished already
    with_gpus(monkeypatch, True)
    assert precision_of(pretrain(config)) == "fp32"  # it was begun so, and is not refused for it
    assert asked == [0]
    other = pretrain(dataclasses.replace(config, name="other", epochs=1))
    assert precision_of(other) == other.result["engine"]["precision"] == "bf16"
    assert other.record["key"] != run.record["key"]
    with pytest.raises(ValueError, match=r"precision bf16 \(now fp32\)"):
        pretrain(dataclasses.replace(config, name="other", epochs=1, precision="fp32"))


def test_a_run_that_did_nothing_settles_anew(config, monkeypatch):
    def fail(*job_and_places):
        raise ValueError("no step was taken")

    monkeypatch.setattr(pretraining, "run_job", fail)
    for found, precision in ((False, "fp32"), (True, "bf16")):
        with_gpus(monkeypatch, found)
        with pytest.raises(ValueError, match="no step was taken"):
            pretrain(config)
        assert precision_of(Run(f"{config.storage}/tiny")) == precision


@pytest.mark.parametrize("supported", [True, False])
def test_this_machine_s_gpu_says_what_it_can(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported and not including_emulation)
    monkeypatch.setattr(ray_cluster, "connect", lambda: pytest.fail("nobody needs Ray for that"))
    assert gpus_with_bf16(2) is supported


@pytest.mark.parametrize(
    ("nodes", "startable", "found"),
    [
        ([{"CPU": 8.0}], [], False),
        ([{"CPU": 8.0, "GPU": 2.0, "accelerator_type:H200": 1.0}], [], True),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}], [], True),
        ([{"GPU": 1.0, "accelerator_type:A100": 1.0}, {"GPU": 1.0, "accelerator_type:V100": 1.0}], [], False),
        ([{"CPU": 8.0}], [{"CPU": 8.0, "GPU": 1.0}], True),
        ([{"CPU": 8.0}], [{"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1}], False),
    ],
)
def test_a_cluster_is_asked_where_there_are_workers(monkeypatch, nodes, startable, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    connected = []
    monkeypatch.setattr(ray_cluster, "connect", lambda name: connected.append(name))
    monkeypatch.setattr(ray_cluster, "alive_nodes", lambda: [{"Resources": each} for each in nodes])
    monkeypatch.setattr(ray_cluster, "_startable", lambda: startable)
    assert gpus_with_bf16(0) is False and not connected
    assert gpus_with_bf16(2, name="run") is found and connected == ["run"]
    assert gpus_with_bf16(2, 0) is False  # told to leave them alone


def test_nothing_learnt_is_told_and_kept(config, capsys):
    run = pretrain(dataclasses.replace(config, optimizer="adam", learning_rate=1e-30, warmup_epochs=0))
    (warning, *more) = [text for text in run.result["warnings"] if "chance level" in text]
    assert not more and f"chance level is {math.log(31):.3f}" in warning
    steps = run.result["steps"] // 2
    assert f"at step {steps} " in warning  # as soon as an epoch is over
    printed = capsys.readouterr().out
    assert printed.count(f"tiny: warning: {warning}") == 1
    assert "compared by top1 and the probe, not by the loss" in printed
    assert run.result["compare_by"] in printed
    assert warning in (run.folder / "report.html").read_text()


def test_other_methods_losses_can_be_compared(config):
    run = pretrain(dataclasses.replace(config, method="rotnet", recipe=None, epochs=1))
    assert run.result["compare_by"] is None


@pytest.mark.parametrize(("epochs", "where"), [(4, "profile/trace.json.gz"), (1, "no profile: it starts after 10 steps")])
def test_a_profile_is_left_where_it_is_said(config, capsys, epochs, where):
    run = pretrain(dataclasses.replace(config, profile=True, epochs=epochs))
    assert run.result["steps"] == 3 * epochs
    assert (run.folder / "profile" / "trace.json.gz").exists() == (epochs == 4)
    assert where in capsys.readouterr().out


def test_a_micro_batch_that_does_not_divide_is_one_sentence_before_anything_is_begun(config):
    with pytest.raises(ValueError, match=r"--micro-batch 3 must divide the 8 patches that each worker has of a batch: try 2"):
        pretrain(dataclasses.replace(config, micro_batch=3, workers=2))
    assert not Run(f"{config.storage}/tiny").folder.exists()


@pytest.mark.parametrize(("flags", "wanted"), [([], None), (["--compile"], True), (["--no-compile"], False)])
def test_what_is_on_where_it_helps_can_be_put_on_and_off(flags, wanted):
    given = parse(PretrainConfig, ["--data", "shards", "--name", "run", *flags], prog="pretrain.py", description="")
    assert given.compile is wanted and given.channels_last is None
