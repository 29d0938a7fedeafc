"""A cluster of two machines that is up, as the documentation says, and the settings of the runs on it."""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.cluster.faults import Course, submitted
from tests.cluster.rig import Rig, cluster_file, two_nodes
from train.config import PretrainConfig
from train.records.runs import Run
from train.stages.pretraining import pretrain

_ROUNDING = 1e-9  # a step more or less moves weights by 1e-6
_BOTH_ARE_THERE = """
import ray, time
ray.init(log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
"""


class Cluster(NamedTuple):
    """One that is up. file: of the cluster, as `ray` is given it."""

    rig: Rig
    file: Path

    def submit(self, script: str, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess:
        return self.rig.here("ray", "submit", self.file, script, "--", *arguments, timeout=timeout)


@pytest.fixture(scope="session")
def shards(small_set, tmp_path_factory) -> Path:
    """The shard set, in a folder whose name has a blank."""
    link = tmp_path_factory.mktemp("shared") / "shards of ours"
    link.symlink_to(small_set)
    return link


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory) -> Path:
    """The run in one process. It also leaves the compiled colour steps that the machines get with the project."""
    return pretrain(PretrainConfig(**settings(shards, tmp_path_factory.mktemp("alone")), workers=0)).folder


def settings(shards: Path, storage: Path) -> dict:
    """Layer norm only, and float64: a worker's share of the batch makes no difference but for rounding."""
    return {
        "data": str(shards),
        "storage": str(storage),
        "name": "run",
        "backbone": "test_convnext",
        "image_size": 32,
        "projection_dim": 16,
        "batch_size": 20,
        "epochs": 6,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "precision": "fp64",
        "log_every": 1,
        "checkpoint_every": 1,
        "threads": 1,
    }


@pytest.fixture(scope="session")
def cluster(undisturbed, tmp_path_factory) -> Iterator[Cluster]:
    """Both machines up, as the documentation says."""
    with two_nodes(tmp_path_factory.mktemp("rig")) as rig:
        file = cluster_file(rig)
        token = rig.here("bash", "-c", "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")
        assert token.returncode == 0, token.stdout
        up = rig.here("ray", "up", file, "-y", timeout=180)
        assert up.returncode == 0, up.stdout
        joined = rig.here("ray", "exec", file, f"timeout 120 python -c {shlex.quote(_BOTH_ARE_THERE)}", timeout=180)
        assert joined.returncode == 0, joined.stdout
        yield Cluster(rig, file)


def steady(shards, storage) -> dict:
    """No step knows how many there will be, so that a run of as many steps as were taken is the same up to there. Checkpoints at
    each epoch's end, every third step. The learning rate is so small that rounding does not grow over thousands of steps."""
    changes = {"optimizer": "sgd", "learning_rate": 1e-5, "schedule": "constant", "warmup_epochs": 0, "checkpoint_every": 0}
    return settings(shards, storage) | changes | {"probe_every": 0}


@pytest.fixture(scope="module")
def course(cluster, shards) -> Iterator[Course]:
    """A run on both machines that has no end."""
    rig = cluster.rig
    config = rig.folder / "run.yaml"
    config.write_text(yaml.safe_dump(steady(shards, rig.drive) | {"workers": "1:2", "epochs": 10**6}))
    command = ["ray", "submit", cluster.file, "train/pretrain.py", "--", "--config", config]
    with submitted(rig, command, rig.folder / "driver.log"), Course(rig, rig.drive / "run") as course:
        course.until(lambda: course.workers == 2 and course.step > 3, "a run on both machines")
        yield course


def as_if_nothing_had_happened(course: Course, shards: Path, folder: Path) -> int:
    """End the endless run, and hold it, up to its newest checkpoint, against a run of as many steps in one process. Returns how
    many these are."""
    course.end()
    checkpoint = course.checkpoint()
    steps = checkpoint["step"]
    rows = course.rows()[:steps]
    assert steps % 3 == 0 and [row["step"] for row in rows] == list(range(1, steps + 1))
    given = steady(shards, folder) | {"workers": 0, "epochs": steps // 3, "checkpoint_every": steps}
    alone = pretrain(PretrainConfig(**given)).folder
    losses, undisturbed = ([row["loss"] for row in each] for each in (rows, Run(alone).metrics()))
    np.testing.assert_allclose(losses, undisturbed, rtol=0, atol=_ROUNDING)
    for name, weight in load_file(alone / "backbone.safetensors").items():
        np.testing.assert_allclose(checkpoint["model"][f"backbone.{name}"], weight, rtol=0, atol=_ROUNDING, err_msg=name)
    return steps
