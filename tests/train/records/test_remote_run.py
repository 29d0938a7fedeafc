"""Runs at a URL: what goes there and comes back, whose run it is, and that a killed one ends as an undisturbed one."""

import contextlib
import dataclasses
import errno
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file

from pipelines import remote_folder
from pipelines.loader import ViewLoader
from pipelines.remote_folder import RemoteFolder
from pipelines.training_input import read_training_input
from tests.helpers import ROOT, assert_refused, call_script
from tests.train.records.lock_race import contend
from train import report
from train.config import EvaluateConfig, PretrainConfig
from train.records import remote_run, run_lock, uploader
from train.records.init_weights import resolve_init
from train.records.remote_run import CHECKPOINT_NAME, Mirror, fetch_source, local_storage
from train.records.run_lock import LOCK_NAME, LockLost, StoreLock, exclusive_lock
from train.records.runs import Run, find_run, open_run
from train.records.uploader import RunUploader
from train.report import ReportConfig
from train.scoring import features
from train.stages import pretraining
from train.stages.pretraining import pretrain
from train.trainer import loop

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def url(no_one_s_stores, tmp_path, monkeypatch) -> str:
    """Of a run at a store of files."""
    return f"file://{tmp_path}/store/runs/kidney"


@pytest.fixture
def quick(monkeypatch):
    """Nothing waits for long, neither for changes nor for a store that fails."""
    monkeypatch.setattr(remote_run, "SYNC_INTERVAL_S", 0.02)
    monkeypatch.setattr(uploader, "SYNC_INTERVAL_S", 0.02)
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.005)
    monkeypatch.setattr(remote_folder, "_FIRST_PAUSE", 0.001)


@contextlib.contextmanager
def another_node(monkeypatch, tmp_path, name="other"):
    with monkeypatch.context() as patch:
        patch.setenv("PATCHCLR_CACHE", str(tmp_path / name))
        yield


def at_store(url) -> set[str]:
    return set(RemoteFolder(url).names())


def left(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith((".lock", ".pull"))}


def until(what) -> None:
    ends = time.monotonic() + 20
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.005)


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# Where


def test_a_folder_is_where_it_was(tmp_path):
    assert local_storage("runs") == Path("runs")
    run = open_run(str(tmp_path), "kidney")
    assert (run.folder, run.url, run.place) == (tmp_path / "kidney", None, str(tmp_path / "kidney"))
    assert not run.folder.exists()
    run.fetch(), run.publish()  # nothing to do


def test_a_url_is_in_the_cache(no_one_s_stores, tmp_path):
    run = open_run(f"file://{tmp_path}/store/", "kidney")
    assert run.folder == tmp_path / "cache/runs/file" / str(tmp_path)[1:] / "store/kidney"
    assert run.place == run.url == f"file://{tmp_path}/store/kidney"
    assert run.cell("5%-seed1").url == f"{run.url}/cells/5%-seed1"
    assert run.cell("5%-seed1").folder == run.cell("5%-seed1").mirror.folder == run.folder / "cells/5%-seed1"
    assert not run.folder.exists()  # only looked for


@pytest.mark.parametrize("bad", ["https://host/runs/x", "s3:///x", "file:///a/../b/x", "file:///a/.x"])
def test_urls_that_no_run_is_at(bad):
    with pytest.raises(ValueError, match="storage"):
        Mirror(bad)


# Up and down


def test_what_one_node_pushes_the_other_pulls(url, tmp_path, monkeypatch):
    here = Mirror(url)
    files = {"run.json": b"{}", "metrics.jsonl": b"", "tensorboard/events": b"e", "profile/trace": b"t", "head.pt": b"w" * 10}
    fill(here.folder, files | {".hidden": b"", "ray/x": b"", ".a.json.1.partial": b"", "checkpoints/step-1/checkpoint.pt": b"c"})
    here.push()
    assert at_store(url) == set(files)
    with another_node(monkeypatch, tmp_path):
        there = Mirror(url)
        assert there.folder != here.folder
        there.pull(whole=False)
        assert left(there.folder) == {"run.json", "metrics.jsonl"}
        there.pull(whole=True)
        assert left(there.folder) == {"run.json", "metrics.jsonl", "head.pt"}
        assert (there.folder / "head.pt").read_bytes() == files["head.pt"]


def test_a_checkpoint_may_be_removed_while_the_files_are_looked_through(url, monkeypatch):
    """By the trainer, whose files another thread puts at the URL meanwhile."""
    here, list_folder = Mirror(url), os.scandir
    fill(here.folder, {"run.json": b"{}", "checkpoints/step-1/checkpoint.pt": b"c", "tensorboard/events": b"e"})

    def list_late(path):
        if Path(path).name == "step-1":
            monkeypatch.setattr(os, "scandir", list_folder)
            shutil.rmtree(path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", list_late)
    here.push()
    assert not (here.folder / "checkpoints/step-1").exists()
    assert at_store(url) == {"run.json", "tensorboard/events"}


def test_a_folder_that_cannot_be_looked_through_is_not_passed_over(url, monkeypatch):
    here, list_folder = Mirror(url), os.scandir
    fill(here.folder, {"run.json": b"{}", "tensorboard/events": b"e"})

    def refuse(path):
        if Path(path).name == "tensorboard":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        here.push()


def counted(monkeypatch, method) -> list[str]:
    names, real = [], getattr(RemoteFolder, method)

    def count(self, name, *rest):
        names.append(name)
        return real(self, name, *rest)

    monkeypatch.setattr(RemoteFolder, method, count)
    return names


def test_only_what_differs_goes_over_the_network(url, monkeypatch, tmp_path):
    here = Mirror(url)
    fill(here.folder, {"run.json": b"{}", "backbone.safetensors": b"w"})
    written, read = counted(monkeypatch, "write"), counted(monkeypatch, "read")
    here.push()
    here.push()
    here.pull(whole=True)
    assert (sorted(written), read) == (["backbone.safetensors", "run.json"], [])
    with another_node(monkeypatch, tmp_path):
        there = Mirror(url)
        there.pull(whole=True)
        there.pull(whole=True)
        there.push()
        assert (len(written), sorted(read)) == (2, ["backbone.safetensors", "run.json"])
        (there.folder / "run.json").write_bytes(b"[]")  # as long as before
        there.push()
    here.pull(whole=False)
    assert (here.folder / "run.json").read_bytes() == b"[]"
    assert (written[2:], read[2:]) == (["run.json"], ["run.json"])


def test_what_is_not_at_the_url_is_of_a_run_that_is_no_more(url, tmp_path):
    """It was removed there, or what a process left here that was killed before it could push."""
    here = Mirror(url)
    fill(here.folder, {"run.json": b"{}", "backbone.safetensors": b"w"})
    here.push()
    fill(here.folder, {"result.json": b"{}", "checkpoints/step-9/checkpoint.pt": b"c", "tensorboard/events": b"e"})
    (here.folder / "backbone.safetensors").write_bytes(b"other")
    assert Run(here.folder).has_work()
    here.pull(whole=False)
    assert left(here.folder) == {"run.json"} and not Run(here.folder).has_work()
    shutil.rmtree(tmp_path / "store")
    assert find_run(url, "runs") is None
    assert left(here.folder) == set()


def test_the_result_comes_last(url, monkeypatch):
    here = Mirror(url)
    fill(here.folder, {name: b"{}" for name in ("result.json", "run.json", "z.json", "report.html", "tensorboard/a")})
    written = counted(monkeypatch, "write")
    here.push()
    assert len(written) == 5 and written[-1] == "result.json"


def test_large_files_come_in_parts_and_whole(url, monkeypatch, tmp_path):
    here, data = Mirror(url), os.urandom(1000)
    fill(here.folder, {"backbone.safetensors": data})
    here.push()
    monkeypatch.setattr(remote_run, "_CHUNK_BYTES", 300)
    with another_node(monkeypatch, tmp_path):
        fetch_source(url)
        assert (Mirror(url).folder / "backbone.safetensors").read_bytes() == data
        shutil.rmtree(Mirror(url).folder)
        monkeypatch.setattr(RemoteFolder, "read", lambda self, name, start, stop: data[start : min(stop, 500)])
        with pytest.raises(ValueError, match=r"kidney/backbone.safetensors changed while it was downloaded; start again"):
            Mirror(url).pull(whole=True)
        assert left(Mirror(url).folder) <= {".incoming/backbone.safetensors"}


def test_who_trains_here_has_the_newer_files(url):
    here = Mirror(url)
    fill(here.folder, {"metrics.jsonl": b"1\n"})
    here.push()
    with exclusive_lock(here.folder, 0):
        assert here.is_training_here()
        fill(here.folder, {"metrics.jsonl": b"1\n2\n", "result.json": b"{}"})
        here.pull(whole=True)
        assert left(here.folder) == {"metrics.jsonl", "result.json"}
        assert (here.folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
    assert not here.is_training_here()
    here.pull(whole=True)
    assert (here.folder / "metrics.jsonl").read_bytes() == b"1\n"


def test_who_begins_to_train_while_files_are_fetched_keeps_its_own(url, monkeypatch):
    here, real = Mirror(url), RemoteFolder.read
    fill(here.folder, {"metrics.jsonl": b"1\n"})
    here.push()
    with contextlib.ExitStack() as stack:

        def begins(self, *rest):
            stack.enter_context(exclusive_lock(here.folder, 0))
            fill(here.folder, {"metrics.jsonl": b"1\n2\n"})
            return real(self, *rest)

        (here.folder / "metrics.jsonl").unlink()
        monkeypatch.setattr(RemoteFolder, "read", begins)
        here.pull(whole=True)
        assert (here.folder / "metrics.jsonl").read_bytes() == b"1\n2\n"


def test_the_cache_s_disk(url, monkeypatch, tmp_path):
    Mirror(url).store.write("run.json", b"{}")
    (tmp_path / "file").write_text("")
    with another_node(monkeypatch, tmp_path, "file"), pytest.raises(ValueError, match=r"cannot be written .*PATCHCLR_CACHE"):
        open_run(*url.rsplit("/", 1))


def test_runs_in_the_cache_are_no_shards_that_make_room(no_one_s_stores, small_set, url):
    from pipelines.shard_cache import RemoteSet

    fill(Mirror(url).folder, {"backbone.safetensors": b"w" * 100})
    size = sum(path.stat().st_size for path in small_set.glob("*.tar")) // 2
    with RemoteSet(f"file://{small_set}", limit_bytes=size) as remote:
        for number in range(3):
            remote.local(f"shard-00000{number}.tar")
            remote.release(f"shard-00000{number}.tar")
    assert left(Mirror(url).folder) == {"backbone.safetensors"}


def test_progress_follows_a_trainer_on_another_node(url, quick, monkeypatch, tmp_path):
    here = Mirror(url)
    with another_node(monkeypatch, tmp_path):
        there = Mirror(url)
    with here.followed():
        for rows in (b"1\n", b"1\n2\n"):
            there.store.write("metrics.jsonl", rows)
            until(
                lambda rows=rows: (
                    (here.folder / "metrics.jsonl").exists() and (here.folder / "metrics.jsonl").read_bytes() == rows
                )
            )
    assert not [thread for thread in threading.enumerate() if thread.name == "following a run"]


# Checkpoints


def checkpoint_in(folder: Path, step: str, data: bytes = b"weights") -> Path:
    fill(folder, {f"checkpoints/{step}/{CHECKPOINT_NAME}": data})
    return folder / "checkpoints" / step


def test_the_newest_whole_checkpoint_counts(url, monkeypatch, tmp_path):
    here = Mirror(url)
    for step in ("step-000000002", "step-000000010"):  # as a trainer leaves them that is killed before it removes the older
        here.store.write(f"checkpoints/{step}/{CHECKPOINT_NAME}", step.encode())
    here.store.write("checkpoints/step-000000011/other", b"")
    assert here.checkpoints() == ["step-000000002", "step-000000010"]
    assert Run(here.folder, here).has_work()
    checkpoint_in(here.folder, "step-000000011")  # not uploaded: whoever goes on elsewhere has not got it
    folder = here.fetch_checkpoint("step-000000010")
    assert (folder / CHECKPOINT_NAME).read_bytes() == b"step-000000010"
    assert [path.name for path in folder.parent.iterdir()] == ["step-000000010"]
    here.push_checkpoint("step-000000012", checkpoint_in(here.folder, "step-000000012", b"new") / CHECKPOINT_NAME)
    assert here.checkpoints() == ["step-000000012"]
    read = counted(monkeypatch, "read")
    here.fetch_checkpoint("step-000000012")  # which this node has
    assert read == []
    with another_node(monkeypatch, tmp_path):
        for _ in range(2):  # ranks of a node
            assert (Mirror(url).fetch_checkpoint("step-000000012") / CHECKPOINT_NAME).read_bytes() == b"new"
        assert len(read) == 1
        with pytest.raises(ValueError, match="was removed"):
            Mirror(url).fetch_checkpoint("step-000000010")


def test_metrics_reach_as_far_as_the_checkpoint(url, monkeypatch):
    here = Mirror(url)
    written = counted(monkeypatch, "write")
    with RunUploader(here) as upload:
        fill(here.folder, {"metrics.jsonl": b"1\n"})
        upload.submit(checkpoint_in(here.folder, "step-1"))
        until(here.checkpoints)
        assert written == ["metrics.jsonl", f"checkpoints/step-1/{CHECKPOINT_NAME}"]
    assert at_store(url) == {"metrics.jsonl", f"checkpoints/step-1/{CHECKPOINT_NAME}"}


def test_nobody_waits_for_a_slow_store_and_the_newest_is_uploaded(url, monkeypatch):
    here, go, begun, real, uploaded = Mirror(url), threading.Event(), threading.Event(), Mirror.push_checkpoint, []

    def slow(self, step, file):
        begun.set()
        assert go.wait(20)
        uploaded.append(step)
        real(self, step, file)

    monkeypatch.setattr(Mirror, "push_checkpoint", slow)
    with RunUploader(here) as upload:
        for number in range(1, 5):
            folder = checkpoint_in(here.folder, f"step-{number}", b"%d" % number)
            upload.submit(folder)
            assert begun.wait(20)
            shutil.rmtree(folder)  # the next one takes its place here
        upload.raise_error()
        go.set()
    assert uploaded == ["step-1", "step-4"] and here.checkpoints() == ["step-4"]
    assert here.store.read(f"checkpoints/step-4/{CHECKPOINT_NAME}", 0, 9) == b"4"
    assert not list((here.folder / ".uploading").iterdir())


def test_a_store_that_fails_for_a_while(quick, no_one_s_stores, monkeypatch):
    """Files are tried again with the next look, whatever was said of them; a checkpoint as often as the policy has it."""
    here, failing, failures = Mirror("memory://for-a-while/runs/kidney", tries=3), [False], []
    real = MemoryFileSystem.put_file

    def put_file(self, *rest, **settings):
        if failing[0]:
            failures.append(1)
            raise OSError("busy")
        return real(self, *rest, **settings)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    message = r"step-1/checkpoint.pt cannot be written: 3 tries failed, the last with busy"
    with pytest.raises(ValueError, match=message), RunUploader(here) as upload:  # noqa: PT012
        failing[0] = True
        fill(here.folder, {"metrics.jsonl": b"1\n"})
        until(lambda: len(failures) > 7)
        upload.raise_error()
        failing[0] = False
        until(lambda: "metrics.jsonl" in at_store(here.url))
        failing[0] = True
        upload.submit(checkpoint_in(here.folder, "step-1"))
        until(upload.raise_error)


def test_an_error_of_the_upload_ends_the_block_and_no_thread_is_left(url, monkeypatch):
    here = Mirror(url)
    here.folder.mkdir(parents=True)
    (here.folder / LOCK_NAME).touch()  # as whoever trains on this node does: the second block then need not wait for the first
    monkeypatch.setattr(Mirror, "push_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), RunUploader(here) as upload:
        upload.submit(checkpoint_in(here.folder, "step-1"))
    with pytest.raises(KeyError), RunUploader(here) as upload:  # noqa: PT012  # what went wrong first is told
        upload.submit(checkpoint_in(here.folder, "step-1"))
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("uploader")]


# The lock


def lock_at(url: str, tmp_path: Path, node: str = "here") -> StoreLock:
    return StoreLock(RemoteFolder(url), tmp_path / node)


def hold(url: str, host: str, *, version: int = 1, age: float = 0.0, **changes) -> None:
    """Another process's lock."""
    content = {"id": "x", "host": host, "process": 1, "time": time.time() - age, "lock": "elsewhere"} | changes
    RemoteFolder(url).write(f".lease-{version}" if version else ".lease", json.dumps(content).encode())


@pytest.fixture(params=["file", "s3"])
def lock_url(request, url) -> str:
    return url if request.param == "file" else f"{request.getfixturevalue('bucket')}/kidney"


def test_a_lock_is_taken_renewed_and_released(lock_url, tmp_path):
    lock = lock_at(lock_url, tmp_path)
    lock.acquire()
    assert at_store(lock_url) == {".lease-1"}
    lock.renew()
    lock.renew()
    assert at_store(lock_url) == {".lease-2", ".lease-3"}
    assert json.loads(RemoteFolder(lock_url).read(".lease-3", 0, 1000))["process"] == os.getpid()
    lock.release()
    assert at_store(lock_url) == set()


def test_a_lock_that_was_removed_or_replaced_is_lost(lock_url, tmp_path):
    """Another process may have trained the run meanwhile, to its end."""
    lock = lock_at(lock_url, tmp_path)
    lock.acquire()
    RemoteFolder(lock_url).remove(".lease-1")
    with pytest.raises(LockLost, match=r"the lock of this run was removed.*the same command again to resume"):
        lock.renew()
    assert at_store(lock_url) == set()
    hold(lock_url, "node-7")
    with pytest.raises(LockLost, match="node-7"):
        lock.renew()


@pytest.mark.parametrize("name", [".lease-007", ".lease-0", ".lease-\u0663", ".lease-x", ".lease-" + "9" * 30])
def test_what_is_no_version_is_no_lock(url, tmp_path, name):
    RemoteFolder(url).write(name, b"garbage")
    lock = lock_at(url, tmp_path)
    lock.acquire()
    assert at_store(url) == {name, ".lease-1"}


@pytest.mark.parametrize(
    "content",
    [b"", b'{"id": "x"', b"\xff\xfegarbage", b"{}", b"[1]", b"null", b'{"id": "x", "host": "y", "lock": null, "time": NaN}',
     b'{"id": "x", "host": "y", "lock": null, "time": "now"}', b'{"id": 1, "host": "y", "lock": null, "time": 1}'],
)  # fmt: skip
def test_a_damaged_lock_is_named(url, tmp_path, content):
    RemoteFolder(url).write(".lease-3", content)
    with pytest.raises(ValueError, match=rf"{re.escape(url)}/\.lease-3, the lock of this run, is damaged: .* remove it"):
        lock_at(url, tmp_path).acquire()
    assert RemoteFolder(url).read(".lease-3", 0, 1000) == content


def test_a_file_system_without_hard_links_is_named(url, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fails)
    with pytest.raises(ValueError, match="this file system has no hard links"):
        lock_at(url, tmp_path).acquire()
    assert at_store(url) == set()


def test_a_live_one_is_refused_with_its_host(url, quick, tmp_path, capsys):
    stop = threading.Event()
    hold(url, "node-7")

    def renew():
        version = 1
        while not stop.wait(0.02):
            version += 1
            hold(url, "node-7", version=version)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r"kidney is being trained by another process, on node-7: .* wait 60 s, or .*--name"):
            lock_at(url, tmp_path, "kidney").acquire()
    finally:
        stop.set()
        thread.join()
    assert "kidney: node-7 trained it 0 s ago; if that process has died, this one starts in 60 s" in capsys.readouterr().out


@pytest.mark.parametrize(("age", "expires_s", "least_s"), [(0.0, 0.3, 0.29), (-1000.0, 0.3, 0.29), (61.0, 60.0, 0.0)])
@pytest.mark.parametrize("version", [0, 7])
def test_one_that_expired_is_taken_over(url, quick, tmp_path, monkeypatch, age, expires_s, least_s, version):
    """Also one of a node whose clock is ahead, and one of the first release, which had no versions."""
    hold(url, "node-7", age=age, version=version)
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", expires_s)
    began, lock = time.monotonic(), lock_at(url, tmp_path)
    lock.acquire()
    assert time.monotonic() - began >= least_s
    lock.renew()
    assert at_store(url) == {f".lease-{version + 1}", f".lease-{version + 2}"}


def test_one_that_is_released_while_another_waits(url, quick, tmp_path):
    first, second = lock_at(url, tmp_path, "one"), lock_at(url, tmp_path, "two")
    first.acquire()
    timer = threading.Timer(0.1, first.release)
    timer.start()
    second.acquire()
    timer.join()
    second.renew()


def test_of_this_node_the_kernel_tells(url, tmp_path, monkeypatch):
    """A process that was killed here has left a lock at the store and none here: nobody waits for it."""
    fill(tmp_path / "here", {".lock": b""})
    hold(url, "here", lock=run_lock._file_identity(tmp_path / "here/.lock"))
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: pytest.fail("it waited"))
    lock_at(url, tmp_path).acquire()


def test_whoever_lost_the_lock_ends_and_leaves_it_alone(url, quick):
    here = Mirror(url)
    with (  # noqa: PT012
        pytest.raises(LockLost, match="is being trained by another process, on node-8, which took over the lock"),
        RunUploader(here) as upload,
    ):
        hold(url, "node-8", version=1000)
        until(upload.raise_error)
    assert json.loads(here.store.read(".lease-1000", 0, 1000))["host"] == "node-8"


def test_a_suspended_holder_sees_that_others_came_and_went(url, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 0.0)
    suspended, other = lock_at(url, tmp_path, "one"), lock_at(url, tmp_path, "two")
    suspended.acquire()
    other.acquire()
    other.renew()
    with pytest.raises(LockLost, match="is being trained by another process, on "):
        suspended.renew()
    other.release()
    with pytest.raises(LockLost):
        suspended.renew()
    assert at_store(url) == set()


def test_no_checkpoint_is_uploaded_without_the_lock(url):
    here = Mirror(url)
    with pytest.raises(LockLost), RunUploader(here) as upload:  # noqa: PT012
        hold(url, "node-8", version=2)
        upload.submit(checkpoint_in(here.folder, "step-1"))
        until(upload.raise_error)
    assert here.checkpoints() == []


def test_a_write_whose_answer_was_lost_counts(lock_url, tmp_path, monkeypatch):
    """The driver's request arrived and timed out; the next try finds the object there."""
    real, lock = RemoteFolder.create, lock_at(lock_url, tmp_path)

    def create(self, *rest):
        real(self, *rest)
        real(self, *rest)

    monkeypatch.setattr(RemoteFolder, "create", create)
    lock.acquire()
    lock.renew()
    assert at_store(lock_url) == {".lease-1", ".lease-2"}


def test_a_late_create_of_a_version_that_was_passed_is_no_lock(url, tmp_path):
    """A process saw nobody, and was suspended before it created the first version, which has been removed since."""
    lock, late = lock_at(url, tmp_path, "one"), lock_at(url, tmp_path, "two")
    lock.acquire()
    for _ in range(3):
        lock.renew()
    assert not late._create(1)
    assert at_store(url) == {".lease-3", ".lease-4"}


@pytest.mark.faults
@pytest.mark.parametrize("expired", [False, True])
def test_of_processes_that_race_exactly_one_has_the_lock(lock_url, tmp_path, monkeypatch, expired):
    """Three processes, many rounds. Takes some 10 s, most of it to start them."""
    from moto.s3.responses import S3Response

    one_by_one, put_object = threading.Lock(), S3Response.put_object

    def atomic(self):  # as S3 is; moto looks first, and another thread may be between
        with one_by_one:
            return put_object(self)

    monkeypatch.setattr(S3Response, "put_object", atomic)
    processes, rounds = 3, 30 if lock_url.startswith("file") else 5
    if expired:
        for number in range(rounds):
            hold(f"{lock_url}/{number}", "node-7", age=61, version=number)
    context = multiprocessing.get_context("spawn")
    won, refused, barrier = context.Array("i", rounds), context.Array("i", rounds), context.Barrier(processes)
    children = [
        context.Process(target=contend, args=(lock_url, tmp_path / f"node-{k}", processes, barrier, won, refused))
        for k in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        child.kill()
    assert [child.exitcode for child in children] == [0] * processes
    assert list(won) == [1] * rounds and list(refused) == [processes - 1] * rounds
    assert at_store(lock_url) == set()


# A store of runs


@pytest.fixture
def bucket(s3, tmp_path) -> str:
    """A storage on an S3 server, empty."""
    (tmp_path / "nothing").mkdir()
    name = f"runs-{tmp_path.name.lower().replace('_', '-')[:40]}"
    return s3(tmp_path / "nothing", f"{name}/runs")


@pytest.fixture
def settings(small_set, bucket) -> dict[str, object]:
    return {
        "data": str(small_set),
        "storage": bucket,
        "name": "kidney",
        "backbone": "test_resnet",
        "image_size": 32,
        "projection_dim": 16,
        "batch_size": 20,
        "epochs": 3,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "log_every": 1,
        "checkpoint_every": 1,
        "probe_every": 0,
        "threads": 1,
        "workers": 0,
    }


_QUICKLY = """
import functools, json, sys
from pipelines.loader import ViewLoader
from train.trainer import loop
from train.stages import pretraining
from train.config import PretrainConfig
loop.ViewLoader = functools.partial(ViewLoader, backend="torchvision")
pretraining.write_report = lambda runs, path: path
pretraining.pretrain(PretrainConfig(**json.loads(sys.argv[1])))
"""


@pytest.fixture
def quick_views(monkeypatch):
    """No report, and the same views by torchvision, as DALI's graph takes seconds to compile."""
    monkeypatch.setattr(loop, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))
    monkeypatch.setattr(features, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))
    monkeypatch.setattr(pretraining, "write_report", lambda runs, path: path)


def flags_of(given: dict[str, object]) -> list[str]:
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def rows_of(run: Run) -> list[tuple]:
    return [(row["epoch"], row["step"], row["loss"], row["learning_rate"], row["top1"]) for row in run.metrics()]


def weights_of(run: Run) -> dict[str, np.ndarray]:
    return load_file(run.folder / "backbone.safetensors")


def assert_same_weights(one: Run, other: Run, **tolerance) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name, **{"rtol": 0, "atol": 0} | tolerance)


@pytest.mark.faults
def test_killed_and_the_node_lost_it_ends_as_if_undisturbed(settings, quick_views, tmp_path, monkeypatch):
    """Trains in three processes, which import torch for 5 s each."""
    undisturbed = pretrain(PretrainConfig(**settings | {"storage": str(tmp_path / "folder")}))
    url = f"{settings['storage']}/kidney"
    command = [sys.executable, "-c", _QUICKLY, json.dumps(settings)]
    alike = os.environ | {"OMP_NUM_THREADS": "1"}  # a sum in parts, by more threads, has other last bits
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=alike) as process:
        try:
            steps = Mirror(url)
            ends = time.monotonic() + 100
            while not steps.checkpoints() or steps.checkpoints()[-1] < "step-000000003":
                assert process.poll() is None and time.monotonic() < ends, (tmp_path / "log").read_text()
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert any(name.startswith(".lease-") for name in at_store(url)) and "result.json" not in at_store(url)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 0.2)
    run = pretrain(PretrainConfig(**settings))
    assert_same_weights(run, undisturbed)
    assert rows_of(run) == rows_of(undisturbed) and len(run.metrics()) == 9
    assert run.record["key"] == undisturbed.record["key"]
    found = at_store(url)
    assert {name for name in found if "/" not in name} == {name for name in left(undisturbed.folder) if "/" not in name}
    assert [name for name in found if name.startswith("checkpoints")] == [f"checkpoints/step-000000009/{CHECKPOINT_NAME}"]
    assert any(name.startswith("tensorboard") for name in found)


def test_what_was_made_on_one_node_is_used_on_another(settings, quick_views, tmp_path, monkeypatch, capsys):
    """An earlier run by name, evaluation, the report and the preview; finished; and the name taken."""
    from train.stages.evaluation import evaluate

    short = settings | {"epochs": 1}
    first = pretrain(PretrainConfig(**short))
    folder = pretrain(PretrainConfig(**short | {"storage": str(tmp_path / "folder")}))
    assert_same_weights(first, folder)
    with another_node(monkeypatch, tmp_path):
        again = pretrain(PretrainConfig(**short))
        assert again.finished and f"kidney: finished already, {first.url}" in capsys.readouterr().out
        assert_same_weights(again, folder)
        with pytest.raises(
            ValueError, match=rf"taken by a run with epochs 1 \(now 2\): choose another --name, or remove {first.url}"
        ):
            pretrain(PretrainConfig(**short | {"epochs": 2}))
    with another_node(monkeypatch, tmp_path, "third"):
        child = pretrain(PretrainConfig(**short | {"name": "child", "init": "kidney"}))
        same = pretrain(PretrainConfig(**short | {"storage": str(tmp_path / "folder"), "name": "child", "init": "kidney"}))
        assert_same_weights(child, same)
        assert child.record["key"] == same.record["key"]
        assert resolve_init(first.url, "runs").address == first.url
    with another_node(monkeypatch, tmp_path, "fourth"):
        judge = {"data": settings["data"], "backbone": "child", "threads": 1, "draws": 10}
        linear = evaluate(EvaluateConfig(**judge, storage=settings["storage"]))
        assert linear.result["cells"] == evaluate(EvaluateConfig(**judge, storage=str(tmp_path / "folder"))).result["cells"]
        assert {"result.json", "report.html", "predictions.parquet"} <= at_store(linear.url)
    with another_node(monkeypatch, tmp_path, "fifth"):
        report.main(ReportConfig([linear.url, "kidney"], out=str(tmp_path / "both.html"), storage=str(settings["storage"])))
        assert (tmp_path / "both.html").exists()
        seen = read_training_input(first.url)
        assert (seen.batch_size, seen.epochs) == (20, 1) and seen.sets == read_training_input(folder.folder).sets
        with pytest.raises(ValueError, match=f"{first.url}-2/run.json: no such file"):
            read_training_input(f"{first.url}-2")


@pytest.mark.faults
def test_a_finetuning_that_was_cut_off_goes_on_elsewhere(settings, quick_views, tmp_path, monkeypatch):
    """Of two cells the first one is done: what it left comes back, and is not made again."""
    from train.stages import evaluation, finetuning
    from train.stages.evaluation import evaluate

    judge = EvaluateConfig(
        data=str(settings["data"]), backbone="test_resnet", mode="supervised", image_size=32, fraction=[0.5, 1.0], epochs=1,
        threads=1, draws=10, batch_size=20, name="judged", storage=str(settings["storage"]),
    )  # fmt: skip
    whole = evaluate(dataclasses.replace(judge, storage=str(tmp_path / "folder")))
    real, trained = evaluation.train_and_predict, []

    def cut_off(config, fraction, *rest, **others):
        if fraction == 1.0:
            raise KeyboardInterrupt
        return real(config, fraction, *rest, **others)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "train_and_predict", cut_off)
        with pytest.raises(KeyboardInterrupt):
            evaluate(judge)
    run_job = finetuning.run_job
    monkeypatch.setattr(finetuning, "run_job", lambda job, *rest: trained.append(job.url) or run_job(job, *rest))
    with another_node(monkeypatch, tmp_path):
        run = evaluate(judge)
    assert trained == [f"{settings['storage']}/judged/cells/100%-seed42"]
    assert run.result["cells"] == whole.result["cells"]


def test_a_bucket_that_is_not_there_is_said_before_training(settings):
    done = call_script("train/pretrain.py", *flags_of(settings | {"storage": "s3://no-such-bucket/runs"}))
    assert_refused(done, "s3://no-such-bucket/runs/kidney/", "check that the bucket exists")
    assert done.stdout == ""


def test_a_store_that_may_not_be_written_is_said_before_training(settings, quick_views, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with pytest.raises(ValueError, match=r"^memory://read-only/runs/kidney/.* may not be written \(Access Denied\): [^\n]*$"):
        pretrain(PretrainConfig(**settings | {"storage": "memory://read-only/runs"}))
    assert capsys.readouterr().out == ""


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_ray_s_workers_end_with_the_weights_of_one_process(settings, tmp_path):
    """In a Ray of its own, whose workers have the store's address and credentials: that of the tests began without."""
    given = settings | {"backbone": "test_convnext", "precision": "fp64"}
    alone = pretrain(PretrainConfig(**given | {"storage": str(tmp_path / "folder")}))
    environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train/pretrain.py"), *flags_of(given | {"workers": 2})]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    run = find_run("kidney", str(settings["storage"]))
    assert run is not None and run.result["engine"]["workers"] == 2
    assert_same_weights(run, alone, atol=1e-6)
    assert [row["step"] for row in run.metrics()] == list(range(1, 10))
