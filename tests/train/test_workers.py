"""Ray Train: the same training on any number of workers, and a worker's error told as one sentence."""

import shutil

import numpy as np
import pytest

from sharding.manifest import fingerprint, read_manifest
from sharding.selection import select
from train.inputs import Input, SetInput
from train.loop import Job
from train.methods import SimCLR
from train.runs import Run
from train.workers import run_job

NO_BATCH_NORM = "test_convnext"  # layer norm only: each image alone, so a rank's share of the batch makes no difference


def make_job(folder, data, **changes):
    folder.mkdir()
    settings = {
        "folder": folder,
        "input": Input((SetInput(str(data), fingerprint(data), select(read_manifest(data), split="train")),)),
        "method": SimCLR(projection_dim=16, temperature=0.5),
        "backbone": NO_BATCH_NORM,
        "init": "scratch",
        "image_size": 32,
        "batch_size": 20,
        "epochs": 2,
        "optimizer": "adam",
        "peak_learning_rate": 1e-3,
        "weight_decay": 1e-6,
        "warmup_epochs": 0.2,
        "precision": "fp64",
        "seed": 3,
        "threads": 1,
        "compile": False,
        "log_every": 1,
        "checkpoint_every": 0,
        "max_failures": 0,
        "card": {},
    }
    return Job(**(settings | changes))


def curve(folder):
    return np.array([row["loss"] for row in Run(folder).metrics()])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, small_set):
    job = make_job(tmp_path_factory.mktemp("runs") / "one", small_set)
    run_job(job, workers=0)
    return job


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_loss_curve(ray_here, one_process, tmp_path, small_set, workers):
    job = make_job(tmp_path / "run", small_set)
    run_job(job, workers=workers)
    expected = curve(one_process.folder)
    assert len(expected) == job.steps == 2 * (job.input.patches // 20)
    assert abs(curve(job.folder) - expected).max() < 1e-6
    # The curve alone could agree by luck while the loss hardly moves: the weights have to agree too, and to have moved.
    ours, theirs = ((folder / "backbone.safetensors").stat().st_size for folder in (job.folder, one_process.folder))
    assert ours == theirs
    from safetensors.numpy import load_file

    ours, theirs = (load_file(folder / "backbone.safetensors") for folder in (job.folder, one_process.folder))
    assert max(abs(ours[name] - theirs[name]).max() for name in ours) < 1e-6


def test_a_worker_s_mistake_of_the_user_is_one_sentence(ray_here, tmp_path, small_set):
    shutil.copytree(small_set, tmp_path / "shards")
    tar = tmp_path / "shards" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    job = make_job(tmp_path / "run", tmp_path / "shards")
    with pytest.raises(ValueError, match=r"shard-000001\.tar: 2000 bytes long, but patch \S+ ends at byte \d+") as caught:
        run_job(job, workers=1)
    assert "Traceback" not in str(caught.value)


def test_more_workers_than_cores_is_refused(ray_here, tmp_path, small_set):
    with pytest.raises(ValueError, match="--workers 1000: the cluster has"):
        run_job(make_job(tmp_path / "run", small_set), workers=1000)


def test_a_run_begun_without_ray_is_not_begun_again_with_it(one_process):
    with pytest.raises(ValueError, match="was begun without Ray: go on with --workers 0"):
        run_job(one_process, workers=2)
