"""The probe: what it looks at, what it finds, and that the training does not notice it."""

import dataclasses
import functools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from models.backbones import build_backbone
from models.weights import weights_hash
from pipelines.loader import ViewLoader
from sharding.manifest import read_manifest
from sharding.packing import build_shards
from tests.helpers import breast_files, open_files, write_tree
from train.config import PretrainConfig
from train.records.runs import Run
from train.reporting import plots
from train.scoring import features
from train.scoring.metrics import accuracies
from train.stages.pretraining import pretrain
from train.trainer import loop
from train.trainer.loop import HEAD_NAME, Job, fit
from train.trainer.methods import SimCLR
from train.trainer.online_probe import DECAYS, _tuned_ridge, build_probe, knn_predictions, ridge_predictions, run_probe
from train.trainer.worker import single_worker

CPU = torch.device("cpu")
NAMES = {"probe_accuracy", "probe_balanced_accuracy", "probe_knn_accuracy", "probe_knn_balanced_accuracy"}


@pytest.fixture(autouse=True)
def _reference_views(monkeypatch):
    """The same views by torchvision: DALI's graphs take longer to build than these tests to run."""
    for module in (loop, features):
        monkeypatch.setattr(module, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))


class Pixels(nn.Module):
    """A backbone of mean colours; counts what it was given."""

    def __init__(self):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.ones(())), 0

    def forward(self, images):
        self.seen += len(images)
        return self.gain * images.mean(dim=(2, 3))


def config_of(data, **changes):
    return dataclasses.replace(PretrainConfig(data=str(data), name="probed", probe_every=1), **changes)


def plan_of(data, **changes):
    probe, _ = build_probe(config_of(data, **changes))
    assert probe is not None
    return probe


def packed(folder, files, **arguments):
    write_tree(folder / "images", files)
    settings = {"layout": "{class}/{slide}/{magnification}/{name}", "group_by": "slide"} | arguments
    build_shards([folder / "images"], folder / "shards", **settings)
    return folder / "shards"


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Three classes, each of a colour of its own, 8 slides of 5 patches in each; every slide is a little lighter or darker."""
    folder = tmp_path_factory.mktemp("coloured")
    for name, colour in {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}.items():
        for i in range(40):
            path = folder / "images" / name / f"{name} {i // 5}" / "x40" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).normal(colour, 20, (16, 16, 3)) + 2 * (i // 5)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return packed(folder, {}, split="train=0.8,test=0.2")


# The classifiers


@pytest.mark.parametrize("known", [12, 200])
@pytest.mark.parametrize("decay", [1e-3, 1.0, 100.0])
def test_ridge_is_ridge(known, decay):
    """Against scikit-learn, with fewer and with more patches than the 30 features, of which one is constant."""
    rng = np.random.default_rng(known)
    labels = np.arange(known) % 3
    x = rng.normal(size=(known + 50, 30)).astype(np.float32) * np.arange(1, 31) + 5
    x += np.resize(labels, len(x))[:, None] * 10
    x[:, 7] = 3
    mean, std = x[:known].mean(0), np.where(np.arange(30) == 7, 1, x[:known].std(0))
    theirs = Ridge(alpha=known * decay).fit((x[:known] - mean) / std, np.eye(3)[labels])
    found = ridge_predictions(x[:known], labels, x[known:], classes=3, decays=(7.0, decay))
    assert found.shape == (2, 50)
    np.testing.assert_array_equal(found[1], theirs.predict((x[known:] - mean) / std).argmax(1))
    assert len(set(found[1])) == 3


def test_ridge_of_features_that_say_nothing():
    """All patches alike: the commonest class, and no division by 0."""
    found = ridge_predictions(np.ones((5, 4), np.float32), np.array([0, 1, 1, 1, 0]), np.ones((3, 4)), classes=2, decays=DECAYS)
    assert (found == 1).all()


@pytest.mark.parametrize("known", [5, 30, 300])
def test_neighbours_vote_as_in_the_paper(known, monkeypatch):
    """Against the formula, one query and one neighbour at a time; with fewer patches than neighbours, too."""
    monkeypatch.setattr("train.scoring.knn._QUERIES", 7)
    rng = np.random.default_rng(known)
    labels = rng.integers(0, 4, known)
    x, asked = rng.normal(size=(known, 6)) + labels[:, None], rng.normal(size=(40, 6)) + 1
    expected = []
    for query in asked:
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in x]
        votes = [0.0] * 4
        for i in sorted(range(known), key=lambda i: -cosines[i])[:20]:
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        expected.append(votes.index(max(votes)))
    assert knn_predictions(x, labels, asked, classes=4).tolist() == expected
    assert len(set(expected)) > 1


def test_one_near_neighbour_outvotes_two_far_ones_at_a_low_temperature():
    known, labels, asked = np.array([[1.0, 0], [1, 1], [3, -3]]), np.array([0, 1, 1]), np.array([[5.0, 0]])
    assert knn_predictions(known, labels, asked, classes=2).tolist() == [0]
    assert knn_predictions(known, labels, asked, classes=2, temperature=10.0).tolist() == [1]
    assert knn_predictions(known, labels, asked, classes=2, temperature=10.0, neighbours=1).tolist() == [0]


def test_accuracies():
    found = accuracies(np.array([0, 0, 0, 2, 1]), np.array([0, 0, 0, 0, 1]))
    assert found == {"accuracy": 0.8, "balanced_accuracy": 0.875}


# Which patches


def test_test_patches_are_never_looked_at_and_no_slide_is_on_both_sides(coloured):
    probe = plan_of(coloured)
    (chosen,) = probe.input.sets
    rows = read_manifest(coloured).take(chosen.ids).to_pydict()
    assert set(rows["split"]) == {"train"} and len(chosen.ids) == rows["split"].count("train") == 90
    assert rows["label"] == probe.labels.tolist()
    assert len(set(rows["group"])) == 18 and probe.by_group
    parts = {}
    for group, judged, tuning in zip(rows["group"], probe.held_out, probe.tuning, strict=True):
        parts.setdefault(group, set()).add((bool(judged), bool(tuning)))
    assert all(len(sides) == 1 for sides in parts.values())
    assert {side for sides in parts.values() for side in sides} == {(False, False), (False, True), (True, False)}
    for part in (probe.held_out, probe.tuning, ~probe.held_out & ~probe.tuning):
        assert set(probe.labels[part]) == {0, 1, 2}
    judged = int(probe.held_out.sum())
    assert probe.describe() == {"set": "shards", "labels": 90 - judged, "judged": judged, "by_group": True, "every_epochs": 1}


def test_patches_are_as_many_as_asked_for_and_lie_in_few_shards(small_set):
    probe = plan_of(small_set, probe_patches=20)
    manifest = read_manifest(small_set).to_pydict()
    assert probe.input.sets[0].ids.tolist() == [i for i in range(90) if manifest["split"][i] == "train"][:20]
    assert len(probe.held_out) == len(probe.tuning) == len(probe.labels) == 20


def test_every_seed_is_probed_on_the_same_patches(coloured):
    one, other = plan_of(coloured, seed=1), plan_of(coloured, seed=2)
    np.testing.assert_array_equal(one.held_out, other.held_out)
    np.testing.assert_array_equal(one.tuning, other.tuning)


def test_a_slide_per_class_is_cut_by_patch(tmp_path):
    data = packed(tmp_path, breast_files({"a": 20, "b": 20}, slides=1), split_by="patch", split="train=0.8,test=0.2")
    probe, line = build_probe(config_of(data))
    assert not probe.by_group and "of other patches, perhaps of the same slides" in line
    assert set(probe.labels[probe.held_out]) == set(probe.labels[~probe.held_out]) == {0, 1}


def test_another_set_is_probed_on_its_own_split(coloured, other_set):
    probe, line = build_probe(config_of(other_set, probe_data=str(coloured), probe_every=5))
    assert probe.input.sets[0].shards == str(coloured)
    assert line.startswith("probe every 5 epochs: ") and f"labels of {coloured}, evaluated on" in line
    assert "of other groups (slides or patients)" in line


def test_a_set_without_labels_is_not_probed(other_set, small_set):
    probe, line = build_probe(config_of(other_set))
    assert probe is None and line.startswith(f"no probe: {other_set} has no labels of two classes")
    assert build_probe(config_of(small_set, probe_every=0)) == (None, "no probe (--probe-every 0)")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"probe_data": "other"}, "--probe-data .*has no labels of two classes"),
        ({"probe_data": "small", "split": "validation"}, "--probe-data .*there is no split 'validation'"),
        ({"probe_data": "small", "probe_patches": 4}, "--probe-data .*too few labels to be probed on"),
    ],
)
def test_what_cannot_be_probed_is_one_sentence(small_set, other_set, changes, sentence):
    sets = {"other": str(other_set), "small": str(small_set)}
    changes = {name: sets.get(value, value) for name, value in changes.items()}
    with pytest.raises(ValueError, match=sentence):
        build_probe(config_of(small_set, **changes))


@pytest.mark.parametrize(("every", "expected"), [(1, [3, 6, 9, 12, 15]), (2, [6, 12, 15]), (5, [15]), (99, [15])])
def test_due_at_the_end_of_epochs(small_set, every, expected):
    """5 epochs of 3 steps; the last one always."""
    probe = plan_of(small_set, probe_every=every)
    assert [step for step in range(1, 16) if probe.due(step, 3, 15)] == expected


# What it finds


def test_colours_are_told_apart_and_names_alone_are_not(coloured):
    probe, backbone = plan_of(coloured), Pixels()
    found = run_probe(probe, backbone, 16, "cpu", 1)
    assert found == dict.fromkeys(NAMES, 1.0)
    assert backbone.seen == len(probe.labels)
    shuffled = dataclasses.replace(probe, labels=np.random.default_rng(0).permutation(probe.labels))
    assert all(value < 0.7 for value in run_probe(shuffled, backbone, 16, "cpu", 1).values())


def test_judged_labels_do_not_reach_the_classifiers(coloured):
    """With the judged patches' labels turned round, all that was right is wrong."""
    probe = plan_of(coloured)
    turned = np.where(probe.held_out, (probe.labels + 1) % 3, probe.labels)
    assert run_probe(dataclasses.replace(probe, labels=turned), Pixels(), 16, "cpu", 1) == dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_decay_is_chosen_without_the_judged(coloured, seed):
    """On features of mostly noise, where decays differ: what is guessed of the judged patches depends on no label of theirs."""
    probe, rng = plan_of(coloured), np.random.default_rng(seed)
    features_pF = rng.normal(size=(len(probe.labels), 40)) + 0.3 * np.eye(3, 40)[probe.labels]
    others = np.where(probe.held_out, rng.integers(0, 3, len(probe.labels)), probe.labels)
    found, again = (_tuned_ridge(features_pF, dataclasses.replace(probe, labels=each)) for each in (probe.labels, others))
    np.testing.assert_array_equal(found, again)
    known, fitted = ~probe.held_out, ~probe.held_out & ~probe.tuning
    scores = []
    for decay in DECAYS:
        (guess,) = ridge_predictions(
            features_pF[fitted], probe.labels[fitted], features_pF[probe.tuning], classes=3, decays=(decay,)
        )
        scores.append(balanced_accuracy_score(probe.labels[probe.tuning], guess))
    best = DECAYS[scores.index(max(scores))]
    (expected,) = ridge_predictions(
        features_pF[known], probe.labels[known], features_pF[probe.held_out], classes=3, decays=(best,)
    )
    np.testing.assert_array_equal(found, expected)
    assert len(set(scores)) > 2


def test_features_that_are_no_numbers(coloured):
    backbone = Pixels()
    nn.init.constant_(backbone.gain, float("nan"))
    found = run_probe(plan_of(coloured), backbone, 16, "cpu", 1)
    assert found.keys() == NAMES and all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_changed(small_set, dtype):
    """Weights, running statistics, modes, random numbers; nothing stays open."""
    probe = plan_of(small_set)
    torch.manual_seed(1)
    backbone = build_backbone("test_resnet", 32).to(dtype)
    before = weights_hash(backbone), random.getstate(), torch.get_rng_state().tolist()
    first = run_probe(probe, backbone, 32, "cpu", 1)
    after = weights_hash(backbone), random.getstate(), torch.get_rng_state().tolist()
    assert before == after
    assert all(module.training for module in backbone.modules())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not open_files(small_set)
    assert run_probe(probe, backbone, 32, "cpu", 1) == first
    assert not run_probe(probe, backbone.eval(), 32, "cpu", 1).keys() - NAMES and not backbone.training


# In a run


class CutOff(Exception):
    """What ends a run before its time."""


def job_of(folder, data, **changes) -> Job:
    """4 epochs of 4 steps, with batch norm and dropout, a probe after the second and the last."""
    probe = plan_of(data, probe_every=2)
    job = Job(
        folder=folder,
        input=dataclasses.replace(probe.input, window=None),
        method=SimCLR(projection_dim=8, temperature=0.5),
        backbone="test_efficientnet",
        init="scratch",
        image_size=32,
        batch_size=len(probe.labels) // 4,
        epochs=4,
        optimizer="adam",
        peak_learning_rate=1e-3,
        weight_decay=1e-4,
        warmup_epochs=0.2,
        precision="fp32",
        seed=3,
        threads=1,
        compile=False,
        log_every=3,
        checkpoint_every=3,
        max_failures=0,
        probe=probe,
        card={"method": "simclr", "chain": [], "key": "k"},
    )
    folder.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(job, **changes)


def outcome_of(job):
    weights = load_file(job.folder / "backbone.safetensors") | torch.load(job.folder / HEAD_NAME, weights_only=True)
    rows = [
        {name: value for name, value in row.items() if name != "data_wait" and not name.endswith("_per_s")}
        for row in Run(job.folder).metrics()
    ]
    return weights, {row["step"]: row for row in rows}


def test_a_run_with_a_probe_ends_as_one_without_and_its_rows_come_again(tmp_path, small_set):
    job = job_of(tmp_path / "probed", small_set)
    fit(job, single_worker(job.folder, CPU))
    weights, rows = outcome_of(job)
    assert [step for step, row in rows.items() if row.keys() >= NAMES] == [8, 16]
    assert not any(row.keys() & NAMES for step, row in rows.items() if step not in (8, 16))
    assert sorted(rows) == [3, 6, 8, 9, 12, 15, 16]

    plain = job_of(tmp_path / "plain", small_set, probe=None)
    fit(plain, single_worker(plain.folder, CPU))
    plain_weights, plain_rows = outcome_of(plain)
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights | plain_weights)
    without = {step: {name: row[name] for name in row.keys() - NAMES} for step, row in rows.items()}
    assert without == plain_rows | {8: without[8]}

    cut = job_of(tmp_path / "cut", small_set)
    worker = single_worker(cut.folder, CPU)

    def save(step, write):
        if step == 9:  # the rows of steps 7 to 9 are ahead of the newest checkpoint, the probe's among them
            raise CutOff
        real(step, write)

    real, worker.store.save = worker.store.save, save
    with pytest.raises(CutOff):
        fit(cut, worker)
    worker.store.save = real
    assert Run(cut.folder).metrics()[-1]["step"] == 9
    fit(cut, worker)
    cut_weights, cut_rows = outcome_of(cut)
    assert cut_rows == rows
    assert all(torch.equal(weights[name], cut_weights[name]) for name in weights | cut_weights)


def test_a_run_that_diverged_is_probed_as_well(tmp_path, small_set):
    job = job_of(tmp_path / "run", small_set, peak_learning_rate=1e30, epochs=2, log_every=100, checkpoint_every=100)
    with pytest.raises(ValueError, match="training has diverged"):
        fit(job, single_worker(job.folder, CPU))
    assert Run(job.folder).metrics()[-1]["probe_accuracy"] is None


def test_a_stage_says_what_it_was_probed_on(tmp_path, small_set, capsys, monkeypatch):
    monkeypatch.setattr(plots, "pairs", lambda *_, **__: [])
    config = config_of(
        small_set, backbone="test_resnet", image_size=32, batch_size=16, epochs=1, workers=0, threads=1, storage=str(tmp_path)
    )
    run = pretrain(config)
    assert run.result["probe"]["every_epochs"] == 1
    assert run.result["final"].keys() >= NAMES
    assert f"probed: probe every 1 epochs: {run.result['probe']['labels']} labels of {small_set}" in capsys.readouterr().out
    assert "ridge probe" in (run.folder / "report.html").read_text()
    assert not any(name.startswith("probe") for name in run.record["stage"]["config"])
