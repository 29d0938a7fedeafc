import json
import math
from pathlib import Path

import equal_work
import numpy as np
import pytest
import torch
from contenders.equal_work import METRICS, PRETRAINED, WEIGHTS, Images, Task, lightly_arguments, our_batches, rate
from equal_work import Config, difference, main, metric_of, one_run, report_of
from harness import RunFailed
from hypothesis import given
from hypothesis import strategies as st
from peers import Environment
from safetensors.torch import load_file

from models.backbones import build_backbone
from pipelines.loader import ViewLoader
from pipelines.recipes import get_recipe
from train.trainer.optim import learning_rate

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def _task(**settings) -> Task:
    usual = {"shards": "", "judged": "", "work": "", "recipe": "simclr", "backbone": "test_resnet", "image_size": 32}
    usual |= {"batch_size": 16, "epochs": 3, "device": "cpu", "cores": 1, "seed": 5}
    return Task(**(usual | settings))


@given(steps=st.integers(1, 60), warmup=st.floats(0, 0.5))
def test_the_rates_are_those_of_the_loop(steps, warmup):
    warmup_steps = round(warmup * steps)
    for step in range(steps):
        theirs = learning_rate(step, peak=1.0, steps=steps, warmup_steps=warmup_steps)
        assert rate(step, steps=steps, warmup_steps=warmup_steps) == pytest.approx(theirs)


def test_the_batches_are_those_of_the_loader(small_set):
    task = _task(shards=str(small_set))
    images = Images(task)
    loader = ViewLoader(small_set, images.ids, batch_size=16, image_size=32, recipe=get_recipe("simclr"), seed=5)
    expected = []
    for epoch in range(3):
        loader.epoch = epoch
        expected += [[(epoch, int(i)) for i in loader.batch_ids(step)] for step in range(len(loader))]
    assert our_batches(task, images.ids) == expected
    assert len(images) > 3 * 16 and expected[0] != expected[3]


def test_lightly_is_given_the_papers_augmentation():
    mean_and_std = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    wanted = {"min_scale": 0.08, "hf_prob": 0.5, "cj_prob": 0.8, "cj_strength": 1.0, "cj_bright": 0.8, "cj_contrast": 0.8}
    wanted |= {"cj_sat": 0.8, "cj_hue": 0.2, "random_gray_scale": 0.2, "normalize": mean_and_std}  # its own defaults
    assert lightly_arguments("simclr") == wanted
    assert lightly_arguments("simclr-mild")["min_scale"] == 0.3


def _trained(name, tmp_path, small_set, **settings):
    """The losses, and the backbone's weights."""
    work = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
    work.mkdir()
    losses = PRETRAINED[name].run(_task(shards=str(small_set), judged=str(small_set), work=str(work), epochs=2, **settings))[
        "losses"
    ]
    return losses, load_file(work / WEIGHTS)


def test_losses_and_weights_are_the_same_on_the_same_draws(tmp_path, small_set):
    """Pretrains three times, once by the stage and twice on Pillow."""
    ours, weights = _trained("ours", tmp_path, small_set)
    replayed, replayed_weights = _trained("replayed", tmp_path, small_set)
    assert len(ours) == 2 * 3
    assert abs(ours[0] - replayed[0]) < 1e-4
    # Another order, rate or loss moves the later steps by more.
    np.testing.assert_allclose(ours, replayed, atol=2e-3)
    assert weights.keys() == replayed_weights.keys()
    np.testing.assert_allclose(weights["conv1.0.weight"], replayed_weights["conv1.0.weight"], atol=1e-3)
    other_seed, _ = _trained("replayed", tmp_path, small_set, seed=6)
    assert abs(other_seed[0] - ours[0]) > 1e-2


def test_the_plain_loop_draws_views_of_its_own_and_learns(tmp_path, small_set):
    ours, _ = _trained("ours", tmp_path, small_set)
    plain, weights = _trained("plain", tmp_path, small_set)
    again, _ = _trained("plain", tmp_path, small_set)
    together, _ = _trained("plain-joint", tmp_path, small_set)
    assert len(plain) == len(ours) and plain == again
    assert 1e-6 < abs(plain[0] - together[0]) < 0.5  # the same views and weights, normalised together
    assert abs(plain[0] - ours[0]) > 1e-3
    fresh = build_backbone("test_resnet", 32).state_dict()
    assert not torch.equal(weights["bn1.running_mean"], fresh["bn1.running_mean"])
    assert weights.keys() == fresh.keys()


# What is made of the metrics


def test_a_difference_is_paired_by_seed():
    found = difference({0: 0.5, 1: 0.6, 2: 0.7, 3: 0.9}, {2: 0.68, 1: 0.56, 0: 0.44, 7: 0.1})
    assert found is not None and found["seeds"] == 3
    assert found["mean"] == pytest.approx(0.04)  # of 0.06, 0.04 and 0.02
    assert found["high"] - found["mean"] == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)  # t of 2 degrees of freedom
    assert difference({0: 0.5, 1: 0.6}, {1: 0.6}) is None


def test_the_committed_differences_are_made_again():
    """Those of the metrics to the last bit; of the losses those that docs/benchmarks.md has."""
    record = json.loads((RESULTS / "2026-11-24-equal-work-3.json").read_text())
    for each in record["differences"]:
        if each["figure"] in METRICS:
            found = difference(*(metric_of(record, name, each["figure"]) for name in ("ours", each["other"])))
            assert found.items() <= each.items()
    losses = report_of(record).blocks[-1]
    assert losses.header[-1] == "plain, both views as one batch less plain torch and torchvision"
    assert losses.rows[-1][:4] == ["mean distance", "0.0103", "0.0109", "0.0031"]
    assert [row[-1].split()[0] for row in losses.rows[:-1]] == ["+0.0069", "+0.0084", "+0.0098", "+0.0058", "+0.0079"]


# The command


@pytest.fixture
def run_equal_work(tmp_path, monkeypatch, small_set, run_main):
    def run(one_run, **settings):
        monkeypatch.setattr(equal_work, "one_run", one_run)
        monkeypatch.setattr(equal_work, "environment_of", lambda *_: Environment("python", {"lightly": "1.6.0"}, {}))
        usual = {"batch_size": 16, "steps": 11, "seeds": 2}
        return run_main(main, Config(str(tmp_path), str(tmp_path / "out"), data=str(small_set), **(usual | settings)))

    return run


def test_contenders_are_interleaved_by_seed_and_a_failure_stands_in_the_table(run_equal_work):
    calls = []

    def one_run(name, task, peers, work):
        calls.append((task.seed, name))
        if (task.seed, name) == (8, "plain"):
            raise RunFailed("exit code 1: out of memory")
        value = {"ours": 0.9, "random": 0.5}.get(name, 0.7) + 0.01 * task.seed
        run = {"seed": task.seed, "figures": dict.fromkeys(METRICS, value)}
        curve = [4.0, 3.0, {"lightly": 1.0}.get(name, 2.0) + 0.01 * task.seed]
        return run if name == "random" else run | {"curve": curve, "first_epoch": [2.0 + 0.001 * (name == "replayed")]}

    record, text, code = run_equal_work(one_run, seed=7, seeds=3)
    names = list(PRETRAINED)
    without = [name for name in names if name != "plain"]
    assert calls == [(7, name) for name in names] + [(8, name) for name in names] + [(9, name) for name in without]
    assert code == 1 and record["failed"] == {"plain": "exit code 1: out of memory"}
    assert record["settings"]["epochs"] == 3 and record["settings"]["steps"] == 3 * (record["learnt_from"]["patches"] // 16)
    assert "| ours | 3 | 0.980 ± 0.010 | 0.980 ± 0.010 | 2.080 ± 0.010 |" in text
    assert "| plain torch and torchvision (FAILED: exit code 1: out of memory) | 1 | 0.770 | 0.770 | 2.070 |" in text
    assert "| lightly | +0.2000 [+0.2000, +0.2000] | +0.2000" in text and "| random weights | +0.4000" in text
    assert "| plain torch and torchvision | - | - |" in text  # one seed is no interval
    assert "| mean distance | 0.3333 | - | 0.0000 | 0.0000 | - |" in text
    assert record["first_loss_difference"] == pytest.approx(0.001)


@pytest.mark.parametrize("losses", [[3.0, None], [3.0, math.nan]])
def test_a_loss_that_is_no_number_is_a_failure(tmp_path, monkeypatch, losses):
    monkeypatch.setattr(equal_work, "run_contender", lambda *_, **__: {"losses": losses, "seconds": 1.0})
    with pytest.raises(RunFailed, match="its loss is not a number"):
        one_run("ours", _task(epochs=1), Environment("python", {}, {}), tmp_path)


def test_sets_that_cannot_be_used_are_refused(tmp_path, small_set):
    usual = {"work": str(tmp_path / "work"), "out": str(tmp_path / "results"), "data": str(small_set), "dry": True}
    with pytest.raises(ValueError, match="its train split has fewer patches than --batch-size 90"):
        main(Config(**usual, batch_size=90))
    (tmp_path / "unlabelled").mkdir()
    described = json.loads((small_set / "dataset.json").read_text()) | {"classes": []}
    (tmp_path / "unlabelled" / "dataset.json").write_text(json.dumps(described))
    (tmp_path / "unlabelled" / "manifest.parquet").symlink_to(small_set / "manifest.parquet")
    with pytest.raises(ValueError, match="cannot judge: give --judged-on a set with labels"):
        main(Config(**usual, judged_on=str(tmp_path / "unlabelled")))
    assert not (tmp_path / "results").exists()
