import functools
import json
import math
import statistics
import threading
from pathlib import Path

import equal_work
import numpy as np
import pytest
import torch
from contenders.equal_work import PRETRAINED, WEIGHTS, Images, Task, lightly_arguments, our_batches, rate
from equal_work import Config, main, one_run
from equal_work_report import (
    FIRST_LOSS,
    METRIC_NAMES,
    curve_difference,
    difference,
    metrics_table,
    pooled,
    report_of,
)
from harness import RunFailed
from hypothesis import given
from hypothesis import strategies as st
from peers import Environment
from safetensors.torch import load_file

from models.backbones import build_backbone
from pipelines.loader import ViewLoader
from pipelines.recipes import get_recipe
from train.trainer.optim import learning_rate

ROOT = Path(__file__).resolve().parents[2]


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
    assert abs(ours[0] - replayed[0]) < FIRST_LOSS[False]
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
    assert found["spread"] == pytest.approx(math.sqrt((0.1**2 + statistics.variance([0.44, 0.56, 0.68])) / 2))
    assert difference({0: 0.5, 1: 0.6}, {1: 0.6}) is None


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ((0.605, 0.618, 0.614), "within the spread"),
        ((0.63, 0.651, 0.639), "MISSED"),
        ((0.57, 0.589, 0.581), "MISSED"),
        ((0.64, 0.62, 0.63), "not decided"),  # by 0.02 on average, with a spread of 0.01, and anything from -0.03 to 0.07
    ],
)
def test_what_is_said_of_a_difference(ours, verdict):
    found = difference(dict(enumerate(ours)), {0: 0.60, 1: 0.62, 2: 0.61})
    assert found is not None and found["verdict"] == verdict


def test_curves_are_compared_epoch_by_epoch():
    theirs = {0: [5.0, 4.0, 3.0], 1: [5.2, 4.2, 3.2]}
    ours = {0: [5.0, 4.1, 3.0], 1: [5.2, 4.3, 3.2]}
    found = curve_difference(ours, theirs)
    assert found is not None
    expected = {"mean": 0.1 / 3, "largest": 0.1, "epoch": 2, "low": 0.1, "high": 0.1, "spread": math.sqrt(0.02), "seeds": 2}
    assert found.pop("verdict") == "within the spread" and found == pytest.approx(expected)
    far = {seed: [loss + 0.15 for loss in curve] for seed, curve in theirs.items()}
    assert curve_difference(far, theirs)["verdict"] == "MISSED"  # in the mean
    far = {seed: [*curve[:2], curve[2] + 0.3] for seed, curve in theirs.items()}
    assert curve_difference(far, theirs)["verdict"] == "MISSED"  # in an epoch
    far[0][2] += 0.3
    assert curve_difference(far, theirs)["verdict"] == "not decided"
    below = curve_difference({0: [5.0, 4.0, 2.7], 1: [5.2, 4.2, 3.0]}, theirs)
    assert (below["largest"], below["epoch"]) == (pytest.approx(0.25), 3)
    assert (below["low"] + below["high"]) / 2 == pytest.approx(-0.25)  # the sign is that of ours less theirs
    assert below["high"] - below["low"] == pytest.approx(2 * 12.7062 * 0.05, rel=1e-4)  # t of 1 degree of freedom
    opposite = {0: [5.1, 4.0, 3.0], 1: [5.1, 4.2, 3.2]}  # what seeds do in both directions is no difference
    assert curve_difference(opposite, theirs)["mean"] == pytest.approx(0)
    assert curve_difference(ours, {0: theirs[0]}) is None and curve_difference({}, theirs) is None


# The command


def _run(seed, value, curve=None):
    run = {"seed": seed, "figures": dict.fromkeys(METRIC_NAMES, value)}
    return run if curve is None else run | {"curve": curve, "first_epoch": [2.0, *curve], "seconds": 3.0}


@pytest.fixture
def run_equal_work(tmp_path, monkeypatch, small_set, run_main):
    def run(one_run, **settings):
        monkeypatch.setattr(equal_work, "one_run", one_run)
        monkeypatch.setattr(equal_work, "environment_of", lambda *_: Environment("python", {"lightly": "1.6.0"}, {}))
        usual = {"batch_size": 16, "epochs": 3, "seeds": 2}
        return run_main(main, Config(str(tmp_path), str(tmp_path / "out"), data=str(small_set), **(usual | settings)))

    return run


def test_contenders_are_interleaved_by_seed_and_a_failure_stands_in_the_table(run_equal_work):
    calls = []

    def one_run(name, task, peers, work, limit):
        calls.append((task.seed, name))
        if (task.seed, name) == (8, "plain"):
            raise RunFailed("exit code 1: out of memory")
        value = {"ours": 0.9, "random": 0.5}.get(name, 0.7) + 0.01 * task.seed
        curve = [4.0, 3.0, {"lightly": 1.0}.get(name, 2.0) + 0.01 * task.seed]
        return _run(task.seed, value, None if name == "random" else curve)

    record, text, code = run_equal_work(one_run, seed=7, seeds=3)
    names = list(PRETRAINED)
    without = [name for name in names if name != "plain"]
    assert calls == [(7, name) for name in names] + [(8, name) for name in names] + [(9, name) for name in without]
    assert code == 1 and record["failed"] == {"plain": "exit code 1: out of memory"}
    assert record["judged_on"]["grouped"] and record["settings"]["steps"] == 3 * (record["learnt_from"]["patches"] // 16)
    rows = {row[0]: row[1:] for row in metrics_table(record).rows}
    assert rows["ours"] == ["3", *["0.980 ± 0.010"] * 4, "2.080 ± 0.010"] and rows["random weights"][-1] == "-"
    assert "- MISSED: kNN accuracy, ours less lightly: +0.2000 [+0.2000, +0.2000], spread over 3 seeds 0.0100" in text
    assert "ours against lightly: mean distance 0.3333, largest 1.0000 (epoch 3: [+1.0000, +1.0000])" in text
    assert "- within the spread: loss by epoch, ours against the same on our draws: mean distance 0.0000" in text
    assert "- reached: the first step's loss on the same draws: differs by 0, wanted at most 0.0001" in text
    assert "for scale, ours less random weights: linear accuracy +0.400" in text
    assert "less plain torch" not in text  # one seed is no spread


def test_two_run_beside_each_other(run_equal_work):
    both = threading.Barrier(2, timeout=60)  # nobody is done before the next has begun

    def one_run(name, task, peers, work, limit):
        both.wait()
        return _run(task.seed, 0.5, [4.0, 3.0, 2.0]) | {"first_epoch": [2.0 + 0.001 * (name == "replayed") * task.seed]}

    record, text, code = run_equal_work(one_run, contenders=["ours", "replayed"], at_once=2, seeds=2)
    assert code == 0 and {name: [run["seed"] for run in runs] for name, runs in record["runs"].items()} == {
        "ours": [0, 1],
        "replayed": [0, 1],
    }
    assert record["first_loss_difference"] == pytest.approx(0.001)
    assert "- MISSED: the first step's loss on the same draws: differs by 0.001" in text


@pytest.mark.parametrize("losses", [[3.0, None], [3.0, math.nan]])
def test_a_loss_that_is_no_number_is_a_failure(tmp_path, monkeypatch, losses):
    monkeypatch.setattr(equal_work, "run_contender", lambda *_, **__: {"losses": losses, "seconds": 1.0})
    with pytest.raises(RunFailed, match="its loss is not a number"):
        one_run("ours", _task(epochs=1), Environment("python", {}, {}), tmp_path, 1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": 0}, "--seeds 0 is out of range: give at least 1"),
        ({"batch_size": 90}, "its train split has 6. patches, fewer than --batch-size 90"),
        ({"data": "no/such/set"}, "no/such/set: there is no such folder"),
        ({"judged_on": "unlabelled"}, "cannot judge: give --judged-on a set with labels"),
        ({"at_once": 0}, "--at-once 0 is out of range: give at least 1"),
    ],
)
def test_user_errors(tmp_path, small_set, settings, words):
    if "judged_on" in settings:
        dataset = json.loads((small_set / "dataset.json").read_text()) | {"classes": []}
        (tmp_path / "unlabelled").mkdir()
        (tmp_path / "unlabelled" / "dataset.json").write_text(json.dumps(dataset))
        (tmp_path / "unlabelled" / "manifest.parquet").symlink_to(small_set / "manifest.parquet")
        settings = {"judged_on": str(tmp_path / "unlabelled")}
    usual = {"work": str(tmp_path / "work"), "out": str(tmp_path / "results"), "data": str(small_set), "dry": True}
    with pytest.raises(ValueError, match=words):
        main(Config(**(usual | settings)))
    assert not (tmp_path / "results").exists()


# Pooling


@functools.cache
def _committed(name):
    return (ROOT / "benchmarks" / "results" / f"{name}.json").read_text()


def test_results_of_other_seeds_are_pooled():
    first, second = (json.loads(_committed(name)) for name in ("2026-11-23-equal-work-4", "2026-11-24-equal-work-2"))
    both = report_of(pooled({"a": first, "b": second})).record
    whole = json.loads(_committed("2026-11-24-equal-work-3"))
    assert both["runs"] == whole["runs"] and both["settings"]["seeds"] == whole["settings"]["seeds"]
    for name in ("differences", "curve_differences"):  # to the last bit
        assert json.loads(json.dumps(both[name])) == whole[name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"versions": {"torch": "3"}}, "b and a differ in versions: only results of the same task"),
        ({"failed": {"plain": "exit code 1"}}, "differ in failed"),
        ({}, "b has seed [0-9]+, which another has too"),
    ],
)
def test_results_that_do_not_add_up(change, sentence):
    record = json.loads(_committed("2026-11-24-equal-work-2"))
    with pytest.raises(ValueError, match=sentence):
        pooled({"a": record, "b": record | change})
