"""Ray Train with its workers and its driver killed, and with another number of workers afterwards: the same run in the end."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import ROOT
from train.config import PretrainConfig
from train.records.runs import Run
from train.stages.pretraining import pretrain

pytestmark = pytest.mark.faults

_STEPS = 12  # 4 epochs of 3
_SECONDS = 120  # that any one thing may take on a machine with other work


def settings(small_set: Path, storage: Path) -> dict[str, object]:
    """Layer norm only, and float64: a rank's share of the batch makes no difference but for rounding."""
    return {
        "data": str(small_set),
        "storage": str(storage),
        "name": "run",
        "backbone": "test_convnext",
        "image_size": 32,
        "projection_dim": 16,
        "batch_size": 20,
        "epochs": 4,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "precision": "fp64",
        "log_every": 1,
        "checkpoint_every": 1,
        "threads": 1,
    }


@contextlib.contextmanager
def command(given: dict[str, object], workers: str, log: Path) -> Iterator[subprocess.Popen]:
    """The script that a user runs, in the cluster of the tests; ended with the block whatever happens."""
    import ray

    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train" / "pretrain.py"), *flags, "--workers", workers],
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def until(what: Callable[[], object], process: subprocess.Popen, log: Path) -> None:
    """Wait for it, and no longer than the process lives."""
    ends = time.monotonic() + _SECONDS
    while not what():
        assert process.poll() is None, f"it ended with {process.returncode}: {log.read_text()}"
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.01)


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in Run(folder).metrics()]


def process_that_writes(path: Path) -> int | None:
    """Who has the file open to write: rank 0."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samefile(link, path) and "w" in _mode(link):
                return int(link.parts[2])
    return None


def _mode(link: Path) -> str:
    flags = int((link.parents[1] / "fdinfo" / link.name).read_text().split("flags:")[1].split()[0], 8)
    return "w" if flags & (os.O_WRONLY | os.O_RDWR) else "r"


def same_in_the_end(folder: Path, undisturbed: Path) -> None:
    ours, theirs = Run(folder).metrics(), Run(undisturbed).metrics()
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, _STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in ours], [row["loss"] for row in theirs], atol=1e-6)
    one, other = (load_file(path / "backbone.safetensors") for path in (folder, undisturbed))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6, err_msg=name)
    assert Run(folder).record["key"] == Run(undisturbed).record["key"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_set) -> Path:
    given = settings(small_set, tmp_path_factory.mktemp("undisturbed"))
    return pretrain(PretrainConfig(**given, workers=0)).folder  # type: ignore[arg-type]


@pytest.mark.timeout(600)
def test_killed_workers_and_drivers_leave_the_run_as_it_would_have_been(ray_here, undisturbed, small_set, tmp_path):
    """Two workers, of which one is killed; the driver is killed; one worker; killed again; two to the end."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    first, second, third = sorted(random.Random(seed).sample(range(1, _STEPS), 3))
    given, folder, log = settings(small_set, tmp_path), tmp_path / "run", tmp_path / "log"
    metrics = folder / "metrics.jsonl"

    def reached(step: int) -> Callable[[], bool]:
        return lambda: bool(steps := steps_of(folder)) and steps[-1] >= step

    with command(given, "2", log) as driver:
        until(reached(first), driver, log)
        killed = process_that_writes(metrics)
        assert killed and killed != os.getpid()
        os.kill(killed, signal.SIGKILL)
        until(lambda: process_that_writes(metrics) not in (killed, None), driver, log)
        until(reached(second), driver, log)
    with command(given, "1", log) as driver:
        until(reached(third), driver, log)
    with command(given, "2", log) as driver:
        assert driver.wait(_SECONDS) == 0, log.read_text()

    same_in_the_end(folder, undisturbed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_told_to_end_says_how_to_go_on(ray_here, undisturbed, small_set, tmp_path, sent):
    """By Ctrl-C, or by a scheduler: one sentence, and no stack of Ray's."""
    given, folder, log = settings(small_set, tmp_path), tmp_path / "run", tmp_path / "log"
    with command(given, "1", log) as driver:
        until(lambda: len(steps_of(folder)) >= 2, driver, log)
        driver.send_signal(sent)
        assert driver.wait(_SECONDS) == 128 + sent, log.read_text()
    text = log.read_text()
    assert text.endswith("pretrain.py: interrupted; run the same command again to resume\n")
    assert "Traceback" not in text and "***" not in text and "stack" not in text.lower()
    with command(given, "1", log) as driver:
        assert driver.wait(_SECONDS) == 0, log.read_text()
    same_in_the_end(folder, undisturbed)


@pytest.mark.timeout(400)
def test_a_run_goes_on_when_a_node_dies(undisturbed, small_set, tmp_path):
    """Two nodes of a cluster of its own, with a worker each; the node without the driver dies."""
    given = settings(small_set, tmp_path)
    # Short, for the names of sockets in it; and where other clusters of this machine do not look.
    with tempfile.TemporaryDirectory(dir="/tmp") as ray_folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "train" / "cluster" / "two_nodes.py"), json.dumps(given)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS * 2,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    same_in_the_end(tmp_path / "run", undisturbed)
