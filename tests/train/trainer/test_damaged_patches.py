"""Training past damaged patches (--on-bad-patch skip): counted, listed, the same after a kill, and ended where too many are."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch

from pipelines.loader import ViewLoader
from sharding.manifest import read_manifest
from tests.helpers import damage_patches, tiny_pretraining
from tests.train.trainer.test_loop import CutOff, assert_same_weights, cut_after, input_of, job_of, weights_of
from train.config import PretrainConfig
from train.records.data import Input
from train.records.runs import Run
from train.scoring import features
from train.stages.pretraining import pretrain
from train.trainer import loop
from train.trainer.health_checks import HealthChecks
from train.trainer.loop import DAMAGED_NAME, fit
from train.trainer.online_probe import build_probe
from train.trainer.worker import single_worker

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _reference_views(monkeypatch):
    """The same views by torchvision: DALI's graphs take longer to build than these tests to run."""
    for module in (loop, features):
        monkeypatch.setattr(module, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))


@pytest.fixture
def damaged_set(small_set, tmp_path):
    copied = shutil.copytree(small_set, tmp_path / "shards")
    damage_patches(copied, {3, 11})
    return copied


@pytest.fixture
def tenth(monkeypatch):
    """The small sets of these tests may be damaged to a tenth."""
    monkeypatch.setattr(loop, "_MOST_DAMAGED", 0.1)


def names_of(folder):
    return json.loads((folder / DAMAGED_NAME).read_text())


def test_a_run_stops_unless_it_was_told_to_skip(tmp_path, damaged_set):
    job = job_of(tmp_path / "run", damaged_set)
    with pytest.raises(ValueError, match="changed or damaged"):
        fit(job, single_worker(job.folder, CPU))


@pytest.mark.usefixtures("tenth")
def test_skipped_patches_are_counted_and_listed(tmp_path, damaged_set):
    job = job_of(tmp_path / "run", damaged_set, on_bad_patch="skip")
    fit(job, single_worker(job.folder, CPU))
    rows = Run(job.folder).metrics()
    assert rows[-1]["damaged_patches"] == 2
    assert [name.split(": ")[0] for name in names_of(job.folder)] == ["shard-000000.tar"] * 2
    assert [name.split(": 000000_")[1][:6] for name in names_of(job.folder)] == ["000003", "000011"]


@pytest.mark.usefixtures("tenth")
@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path, damaged_set, step):
    """Also where only the part before the kill met one of them."""
    job = job_of(tmp_path / "whole", damaged_set, on_bad_patch="skip", epochs=2)
    fit(job, single_worker(job.folder, CPU))
    cut = dataclasses.replace(job, folder=tmp_path / "cut")
    cut.folder.mkdir()
    with pytest.raises(CutOff):
        fit(cut, cut_after(single_worker(cut.folder, CPU), step))
    fit(cut, single_worker(cut.folder, CPU))
    assert_same_weights(weights_of(cut.folder), weights_of(job.folder))
    assert names_of(cut.folder) == names_of(job.folder)


@pytest.mark.usefixtures("tenth")
def test_patches_that_only_the_part_before_the_kill_met_are_listed(tmp_path, damaged_set, small_set):
    """The set is restored between the two parts."""
    job = job_of(tmp_path / "run", damaged_set, on_bad_patch="skip")
    with pytest.raises(CutOff):
        fit(job, cut_after(single_worker(job.folder, CPU), 6))
    for path in small_set.iterdir():
        shutil.copy2(path, damaged_set / path.name)
    fit(job, single_worker(job.folder, CPU))
    assert len(names_of(job.folder)) == 2


def test_more_than_one_percent_ends_the_run(tmp_path, damaged_set):
    job = job_of(tmp_path / "run", damaged_set, on_bad_patch="skip")
    message = r"shards: [12] of 20 selected patches are damaged, more than 1% \(shard-000000.tar: 000000_0000\S+, ...\): copy or"
    with pytest.raises(ValueError, match=message):
        fit(job, single_worker(job.folder, CPU))
    assert not (job.folder / "backbone.safetensors").exists()


def test_a_probe_is_chosen_from_whole_patches(damaged_set):
    config = PretrainConfig(data=str(damaged_set), name="probed", probe_every=1)
    every, whole = (build_probe(each)[0] for each in (config, dataclasses.replace(config, on_bad_patch="skip")))
    ids = set(every.input.sets[0].ids.tolist())
    assert ids & {3, 11} and set(whole.input.sets[0].ids.tolist()) == ids - {3, 11}
    assert whole.describe()["labels"] + whole.describe()["judged"] == len(ids - {3, 11})


@pytest.mark.parametrize("classes", [[], [0]])
def test_a_probe_that_damage_makes_impossible_is_refused_at_the_start(small_set, damaged_set, classes):
    """Only patches of these classes are whole."""
    damaged = np.flatnonzero(~np.isin(read_manifest(small_set)["label"].to_numpy(), classes))
    damage_patches(damaged_set, set(damaged.tolist()) - {3, 11})
    config = PretrainConfig(data=str(small_set), probe_data=str(damaged_set), name="probed", on_bad_patch="skip")
    with pytest.raises(
        ValueError, match=r"two classes among the patches looked at \(split 'train'\), of which \d+ of 60 are damaged"
    ):
        build_probe(config)


@pytest.mark.usefixtures("tenth")
def test_a_probe_whose_patches_are_damaged_later_ends_no_run(tmp_path, small_set):
    shards = shutil.copytree(small_set, tmp_path / "shards")
    probe, _ = build_probe(PretrainConfig(data=str(shards), name="probed", probe_every=1, on_bad_patch="skip"))
    damage_patches(shards, [int(probe.input.sets[0].ids[0])])
    job = job_of(tmp_path / "run", small_set, on_bad_patch="skip", probe=probe)
    fit(job, single_worker(job.folder, CPU))
    rows = Run(job.folder).metrics()
    assert [row.get("probe_damaged") for row in rows] == [None, None, None, None, 1] * 2
    assert not any("probe_accuracy" in row for row in rows)
    (text,) = HealthChecks(chance_loss=9, grace_steps=99).of_finished(rows[:5])
    assert text == "at step 5 a patch of the probe was damaged: there are no probe metrics from then on"


def test_the_limit_is_of_each_set(tmp_path, small_set, damaged_set, monkeypatch):
    """Two patches of 24: too many for their set, though not for the mixture of 114."""
    monkeypatch.setattr(loop, "_MOST_DAMAGED", 0.05)
    sets = (*input_of(small_set, np.arange(90)).sets, *input_of(damaged_set, np.arange(24)).sets)
    job = job_of(tmp_path / "run", small_set, input=Input(sets), on_bad_patch="skip")
    with pytest.raises(ValueError, match=r"shards: 2 of 24 selected patches are damaged, more than 5% \(shards/shard-000000.tar"):
        fit(job, single_worker(job.folder, CPU))


@pytest.mark.usefixtures("tenth")
def test_the_result_lists_them_and_the_report_warns(tmp_path, damaged_set, capfd):
    """A run that stopped at a damaged patch goes on with skip: the flag is no part of its key."""
    config = tiny_pretraining(damaged_set, tmp_path / "runs", epochs=2, probe_every=1)
    with pytest.raises(ValueError, match=r"changed or damaged.*: the same command with --on-bad-patch skip$"):
        pretrain(config)
    run = pretrain(dataclasses.replace(config, on_bad_patch="skip"))
    splits = read_manifest(damaged_set, columns=["split"])["split"].to_pylist()
    split = [patch for patch in (3, 11) if splits[patch] == "train"]
    assert len(run.result["damaged_patches"]) == len(split) > 0
    (warning,) = (text for text in run.result["warnings"] if "damaged" in text)
    assert warning == "1 damaged patch was skipped (--on-bad-patch): damaged_patches in result.json lists them"
    assert warning in (run.folder / "report.html").read_text().replace("&#x27;", "'")
    assert f"warning: {warning}" in capfd.readouterr().out
