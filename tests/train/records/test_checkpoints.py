"""Checkpoints written by a thread: what was copied, whole or not at all, and an error told where it can be mended."""

import errno
import re
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch

from tests.helpers import ROOT
from train.records.checkpoints import CheckpointStore, copied_state, keep_newest
from train.records.remote_run import CHECKPOINT_NAME
from train.records.retry import retry_io
from train.records.run_lock import exclusive_lock

CPU = torch.device("cpu")


def state_of():
    return {
        "model": {"w": torch.arange(6.0).view(2, 3)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
        "list": [1, "a"],
    }


def load(folder):
    return torch.load(folder / CHECKPOINT_NAME, weights_only=True)


def test_what_is_written_is_the_state_when_it_was_copied(tmp_path):
    state = state_of()
    write = copied_state(state, CPU)
    state["model"]["w"].zero_()
    state["optimizer"]["state"][0]["step"] += 1
    write(tmp_path)
    assert str(load(tmp_path)) == str(state_of())


def test_tensors_keep_their_layout(tmp_path):
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    copied_state({"kernel": kernel}, CPU)(tmp_path)
    found = load(tmp_path)["kernel"]
    assert torch.equal(found, kernel) and found.stride() == kernel.stride()


def test_one_after_the_other_and_not_in_the_caller_s_time(tmp_path):
    store, go, order = CheckpointStore(tmp_path), threading.Event(), []

    def slow(_):
        assert go.wait(20)
        order.append("first")

    store.save(1, slow)
    store.wait(0)  # does not wait
    assert order == []
    threading.Timer(0.05, go.set).start()
    store.save(2, lambda _: order.append("second"))  # waits for the first
    assert order[0] == "first"
    store.wait()
    assert order == ["first", "second"] and store.newest() == "step-000000002"


@pytest.mark.parametrize("how", ["wait", "start"])
def test_an_error_of_the_thread_is_raised_where_somebody_looks_and_once(tmp_path, how):
    store, done = CheckpointStore(tmp_path), []

    def fail(_):
        raise ValueError("no room")

    store.save(1, fail)
    with pytest.raises(ValueError, match="no room"):
        store.wait() if how == "wait" else store.save(2, done.append)
    assert done == []
    store.wait()


def no_room(folder):
    (folder / CHECKPOINT_NAME).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    keep_newest(tmp_path, 3, copied_state({"step": 3}, CPU))
    with pytest.raises(OSError, match="No space left on device"):
        keep_newest(tmp_path, 6, no_room)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]
    keep_newest(tmp_path, 6, copied_state({"step": 6}, CPU))
    assert load(tmp_path / "step-000000006") == {"step": 6}


def test_torch_s_own_error_of_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files stands for the full disk: torch's writer raises no OSError."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write = copied_state({"w": torch.zeros(1_000_000)}, CPU)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: cannot be written") as caught:
            retry_io(lambda: keep_newest(tmp_path, 1, write), tmp_path, timeout_s=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_run_s_folder_that_is_gone_is_not_made_anew(tmp_path):
    with pytest.raises(FileNotFoundError):
        keep_newest(tmp_path / "run" / "checkpoints", 1, copied_state({}, CPU))
    assert not (tmp_path / "run").exists()


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    (tmp_path / ".step-000000002.partial").mkdir()
    (tmp_path / ".step-000000002.partial" / CHECKPOINT_NAME).write_bytes(b"half")
    keep_newest(tmp_path, 4, copied_state({}, CPU))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000004"]


def test_two_processes_do_not_train_one_run(tmp_path):
    script = "import sys; from pathlib import Path; from train.records.run_lock import exclusive_lock\n"
    script += "with exclusive_lock(Path(sys.argv[1]), 0):\n"
    script += "    print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=f"{tmp_path.name} is being trained by another process"), exclusive_lock(tmp_path, 0):
            pass
        other.kill()
        other.wait()
    with exclusive_lock(tmp_path, 0):  # whoever was killed holds nothing
        pass
