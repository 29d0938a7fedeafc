"""Ray Train: the same training on any number of workers, and a worker's error told as one sentence."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from pipelines.sampler import epoch_order
from sharding.cli import parse
from sharding.manifest import fingerprint, read_manifest
from sharding.packing import build_shards
from sharding.selection import select
from tests.helpers import ROOT, damage_patches, encoded, write_tree
from train.cluster import launcher as workers
from train.cluster.launcher import run_job, usable_workers
from train.config import PretrainConfig, worker_range
from train.records.data import Input, SetInput
from train.records.runs import Run
from train.trainer.loop import DAMAGED_NAME, Job, fit
from train.trainer.methods import SimCLR
from train.trainer.worker import single_worker

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


def test_two_workers_give_the_loss_curve_of_one_process(ray_here, one_process, tmp_path, small_set):
    """Ray starts a process for its controller and one for each worker: 20 s of imports."""
    job = make_job(tmp_path / "run", small_set)
    run_job(job, workers=2)
    expected = curve(one_process.folder)
    assert len(expected) == job.steps == 2 * (job.input.patches // 20)
    assert abs(curve(job.folder) - expected).max() < 1e-6
    # The curve alone could agree by luck while the loss hardly moves: the weights have to agree too, and to have moved.
    ours, theirs = ((folder / "backbone.safetensors").stat().st_size for folder in (job.folder, one_process.folder))
    assert ours == theirs
    from safetensors.numpy import load_file

    ours, theirs = (load_file(folder / "backbone.safetensors") for folder in (job.folder, one_process.folder))
    assert max(abs(ours[name] - theirs[name]).max() for name in ours) < 1e-6


@pytest.mark.faults
def test_two_workers_skip_the_patches_that_one_process_skips(ray_here, tmp_path):
    """Each rank meets one of them, and rank 0 lists both. Ray starts a process for its controller and one for each worker."""
    write_tree(tmp_path / "images", {f"{i:03d}.png": encoded(i, format="PNG") for i in range(240)})
    build_shards([tmp_path / "images"], tmp_path / "shards", unlabelled=True)
    ids = np.arange(240)
    batch = epoch_order(ids, seed=3, epoch=0)[:20]
    damage_patches(tmp_path / "shards", batch[[2, 15]].tolist())
    data, jobs = Input((SetInput(str(tmp_path / "shards"), fingerprint(tmp_path / "shards"), ids),)), []
    for name, count in (("one", 0), ("two", 2)):
        jobs.append(make_job(tmp_path / name, tmp_path / "shards", input=data, epochs=1, on_bad_patch="skip"))
        run_job(jobs[-1], workers=count)
    names = [json.loads((job.folder / DAMAGED_NAME).read_text()) for job in jobs]
    assert names[0] == names[1] and len(names[0]) == 2
    assert abs(curve(jobs[0].folder) - curve(jobs[1].folder)).max() < 1e-6


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


@pytest.mark.faults
def test_a_run_begun_without_ray_continues_with_one_worker(ray_here, one_process, tmp_path, small_set):
    """With a range of numbers, as for a cluster that grows. Ray's processes take 15 s of imports."""
    job = make_job(tmp_path / "run", small_set)

    class CutOff(Exception):
        pass

    worker = single_worker(job.folder)
    real = worker.store.save

    def save(step, write):
        real(step, write)
        raise CutOff

    worker.store.save = save
    with pytest.raises(CutOff):
        fit(job, worker)
    assert len(curve(job.folder)) == job.steps_per_epoch
    run_job(job, workers="1:1")
    assert abs(curve(job.folder) - curve(one_process.folder)).max() < 1e-6
    assert json.loads((job.folder / "engine.json").read_text())["workers"] == 1


class Died(Exception):
    """As Ray tells of it. worker_failures: by rank."""

    def __init__(self, **failures):
        super().__init__("training failed")
        self.worker_failures = failures


def attempts(monkeypatch, job, *outcomes):
    """Let attempts come out so: the newest checkpoint after each, and its failure. Returns what they were told, and pauses."""
    newest, told, pauses = [None], [], []
    monkeypatch.setattr(workers, "_newest_checkpoint", lambda job: newest[0])
    monkeypatch.setattr(workers.time, "sleep", pauses.append)
    left = iter(outcomes)

    def attempt(again):
        told.append(again)
        newest[0], error = next(left)
        return error

    try:
        workers._retry_attempts(job, attempt)
    finally:
        assert next(left, None) is None, "there should have been more attempts"
    return told, pauses


def test_failures_count_until_there_is_a_new_checkpoint(monkeypatch, tmp_path, small_set, capsys):
    job, died = make_job(tmp_path / "run", small_set, max_failures=2), Died()
    course = [("step-1", died), ("step-1", died), ("step-2", died), ("step-2", died), ("step-3", died), ("step-9", None)]
    assert attempts(monkeypatch, job, *course) == ([False, *[True] * 5], [0, 15, 0, 15, 0])
    printed = capsys.readouterr().out
    assert printed.count("(failure 1 of at most 2 without a new checkpoint)") == 3
    assert "run: a worker failed (training failed); resuming from step-2 (failure 2 of at most 2" in printed
    with pytest.raises(Died):
        attempts(monkeypatch, job, ("step-1", died), ("step-1", died), ("step-1", died))
    with pytest.raises(Died):
        attempts(monkeypatch, dataclasses.replace(job, max_failures=0), ("step-1", died))


def test_what_the_user_has_to_put_right_is_not_tried_again(monkeypatch, tmp_path, small_set):
    job = make_job(tmp_path / "run", small_set, max_failures=5)
    with pytest.raises(ValueError, match="no such split"):
        attempts(monkeypatch, job, ("step-1", ValueError("no such split")))


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["Connection closed by peer", "hostname='a b', pid=3 ... The actor died because its node has died."], "a b is gone"),
        (["hostname='gpu-1', ... because its worker process has died."], "a worker on gpu-1 died"),
        (["RuntimeError: out of memory\nat line 3"], "a worker failed (RuntimeError: out of memory)"),
        (["KeyError: <object object at 0x7f01>"], "a worker failed (KeyError: <object object>)"),
    ],
)
def test_a_failure_is_told_in_a_few_words(texts, told):
    failures = {str(rank): RuntimeError(text) for rank, text in enumerate(texts)}
    assert workers._reason(Died(**failures)) == told


@pytest.mark.faults
def test_a_worker_that_does_not_reach_the_head_ends(tmp_path):
    """The head is a socket that listens, until it is closed."""
    script = (
        "import sys; from train.cluster import launcher as workers; workers._CUT_OFF_S = 1.0; workers._HEAD_POLL_S = 0.1\n"
        "print('watching', flush=True); workers._end_when_cut_off(sys.argv[1])"
    )
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        watching = subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert watching.stdout.readline() == "watching\n"
            for _ in range(3):
                head.settimeout(60)
                head.accept()[0].close()
            assert watching.poll() is None
            head.close()
            assert f"{address} could not be reached for 1 s" in watching.communicate(timeout=60)[0]
        finally:
            watching.kill()
            watching.wait()
    assert watching.returncode == 1


@pytest.mark.parametrize(
    ("batch_size", "workers", "used"), [(256, 8, 8), (256, 7, 4), (96, 7, 6), (41, 3, 1), (6, 3, 3), (1, 2, 1)]
)
def test_the_global_batch_decides_how_many_workers_have_a_part(batch_size, workers, used):
    assert usable_workers(batch_size, workers) == used


@pytest.mark.parametrize(("given", "found"), [(0, (0, 0)), (2, (2, 2)), ("2", (2, 2)), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_workers_are_a_number_or_a_range(given, found):
    assert worker_range(given) == found


@pytest.mark.parametrize("given", ["0:2", "4:2", -1])
def test_what_is_no_range_is_refused(given):
    with pytest.raises(ValueError, match=f"--workers {given}: give a number from 0, or MIN:MAX"):
        worker_range(given)


def test_a_range_is_read_as_it_is_typed(tmp_path):
    arguments = ["--data", "x", "--name", "y"]
    common = {"prog": "pretrain.py", "description": ""}
    given = parse(PretrainConfig, [*arguments, "--workers", "2:8"], **common).workers
    assert given == "2:8" and type(given) is str  # a run's config.yaml is to have it
    assert parse(PretrainConfig, [*arguments, "--workers", "2"], **common).workers == 2
    (tmp_path / "config.yaml").write_text('workers: "2:8"\n')
    assert parse(PretrainConfig, [*arguments, "--config", str(tmp_path / "config.yaml")], **common).workers == "2:8"
