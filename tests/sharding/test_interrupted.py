"""A build that is cut off or disturbed leaves nothing half-written under a final name, and the next one ends the same."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sharding import packing, staging
from sharding.packing import build_shards
from sharding.sources.archives import FileReader
from tests.helpers import BREAST_LAYOUT, ROOT, encoded, folder_bytes, write_tree

SETTINGS = dict(layout=BREAST_LAYOUT, split="train=0.8,test=0.2", shard_patches=20)


@pytest.fixture
def shards(breast, tmp_path):
    """55 patches of three classes in 3 shards."""
    build_shards([breast], tmp_path / "set", **SETTINGS)
    return tmp_path / "set"


@pytest.mark.faults
def test_a_worker_that_is_killed_is_one_sentence(breast, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "write_shard", _kill_this_process)
    with pytest.raises(ValueError, match="fewer --workers"):
        build_shards([breast], tmp_path / "set", workers=2, **SETTINGS)
    assert not (tmp_path / "set").exists()


def _kill_this_process(task, *, folder, options):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_source_that_vanishes_or_changes_after_the_scan(breast, tmp_path, monkeypatch):
    """Each file is read once, so what is packed is what was checked and hashed; what is gone is quarantined."""
    gone, changed = breast / "Benign/S B0/x40/patch x40 (0).png", breast / "Benign/S B1/x40/patch x40 (0).jpg"
    data = encoded(999)
    assign = packing._assign_shards

    def disturb_then_assign(*arguments):
        gone.unlink()
        changed.write_bytes(data)
        return assign(*arguments)

    monkeypatch.setattr(packing, "_assign_shards", disturb_then_assign)
    summary = build_shards([breast], tmp_path / "set", **SETTINGS)
    assert (summary.packed, summary.quarantined) == (54, 1)
    assert any(str(gone) in note and "unreadable" in note for note in summary.notes)
    monkeypatch.undo()
    write_tree(
        breast, {str(gone.relative_to(breast)): b""}
    )  # an empty file is refused too, so the set is the same but for the reason
    build_shards([breast], tmp_path / "after", **SETTINGS)
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "manifest.parquet"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


KILLED_BUILD = """
import os, signal, sys
from sharding import packing, staging
from sharding import manifest_writer
from sharding import shard_writer

whole, left = staging.write_atomically, [int(sys.argv[3])]

def write_or_die(path, write):
    # Die in the middle of the file whose turn it is: half of it is on the disk.
    def half(temporary):
        write(temporary)
        left[0] -= 1
        if left[0] == 0:
            os.truncate(temporary, temporary.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    whole(path, half)

staging.write_atomically = shard_writer.write_atomically = manifest_writer.write_atomically = write_or_die
packing.build_shards([sys.argv[1]], sys.argv[2], layout=sys.argv[4], split="train=0.8,test=0.2", shard_patches=20)
"""
FILES = 3 * 3 + 3  # tar, index and note of each shard, then manifest, quarantine and dataset.json


@pytest.mark.faults
@pytest.mark.parametrize("turn", [1, 3, 5, 10, FILES])
def test_a_killed_build_leaves_no_set_and_the_next_one_ends_the_same(breast, shards, tmp_path, turn):
    out = tmp_path / "killed" / "set"
    command = [sys.executable, "-c", KILLED_BUILD, str(breast), str(out), str(turn), BREAST_LAYOUT]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
    partial = out.with_name("set.partial")
    assert not out.exists()
    assert any(path.name.endswith(".tmp") for path in partial.iterdir())
    finished = {path.with_suffix(".tar").name for path in partial.glob("shard-*.rows")}
    assert len(finished) == min(3, (turn - 1) // 3)
    inodes = {name: (partial / name).stat().st_ino for name in finished}
    build_shards([breast], out, **SETTINGS)
    assert folder_bytes(out) == folder_bytes(shards)
    assert not partial.exists()
    for name, inode in inodes.items():
        assert (out / name).stat().st_ino == inode  # kept, not written again


@pytest.mark.parametrize(("sent", "to_all"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_an_interrupted_build_ends_at_once_and_the_next_one_ends_the_same(breast, shards, tmp_path, sent, to_all):
    """Sent to one process by a scheduler, or to all of them, as a terminal sends Ctrl-C; SIGTERM twice."""
    out = tmp_path / "again" / "set"
    command = [
        sys.executable, "sharding/build.py", str(breast), "--out", str(out), "--layout", BREAST_LAYOUT,
        "--split", SETTINGS["split"], "--shard-patches", "20", "--workers", "2",
    ]  # fmt: skip
    build = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        while build.poll() is None and not out.with_name("set.partial").exists():
            time.sleep(0.005)
        for _ in range(1 + (sent == signal.SIGTERM)):
            (os.killpg if to_all else os.kill)(build.pid, sent)
            time.sleep(0.02)
        _, stderr = build.communicate(timeout=60)
    finally:
        build.kill()
    assert (build.returncode, stderr) == (128 + sent, "sharding/build.py: interrupted; run the same command again to resume\n")
    build_shards([breast], out, **SETTINGS)
    assert folder_bytes(out) == folder_bytes(shards)


@pytest.mark.faults
def test_a_build_killed_again_and_again_ends_the_same(breast, shards, tmp_path):
    """As a user's: two workers, SIGKILL for all processes, each time a little later."""
    out = tmp_path / "killed" / "set"
    command = [
        sys.executable, "sharding/build.py", str(breast), "--out", str(out), "--layout", BREAST_LAYOUT,
        "--split", SETTINGS["split"], "--shard-patches", "20", "--workers", "2",
    ]  # fmt: skip
    kills = 0
    for files in (1, 2, 5, 8):
        build = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while build.poll() is None and len(list(tmp_path.glob("killed/set.partial/*"))) < files:
            time.sleep(0.005)
        if build.poll() is None:
            os.killpg(build.pid, signal.SIGKILL)
            kills += 1
        build.wait(timeout=20)
        assert kills
        if out.exists():
            break
        assert any((tmp_path / "killed" / "set.partial").iterdir())
    build_shards([breast], out, **SETTINGS)
    assert folder_bytes(out) == folder_bytes(shards)


@pytest.mark.parametrize("change", ["tar", "index", "note", "source", "options"])
def test_a_shard_that_is_not_what_it_was_is_written_again(breast, tmp_path, monkeypatch, change):
    settings = dict(SETTINGS)
    partial = tmp_path / "set.partial"
    monkeypatch.setattr(packing, "read_contents", lambda *arguments: (_ for _ in ()).throw(ValueError("cut off here")))
    with pytest.raises(ValueError, match="cut off here"):
        build_shards([breast], tmp_path / "set", **settings)
    monkeypatch.undo()
    assert len(list(partial.iterdir())) == 9
    (partial / "shard-000009.tar").write_bytes(b"of a build with other arguments")
    match change:
        case "tar":
            flip(partial / "shard-000001.tar", 100)  # in a header: no patch's sha256 tells
        case "index":
            flip(partial / "shard-000001.idx", 20)
        case "note":
            os.truncate(partial / "shard-000001.rows", 300)
        case "source":
            path = breast / "Benign/S B0/x40/patch x40 (0).png"
            path.write_bytes(encoded(999, format="PNG"))
        case "options":
            settings["min_size"] = 2
    build_shards([breast], tmp_path / "set", **settings)
    build_shards([breast], tmp_path / "undisturbed" / "set", **settings)
    assert folder_bytes(tmp_path / "set") == folder_bytes(tmp_path / "undisturbed" / "set")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_was_refused_by_a_later_check_keeps_the_shards(breast, tmp_path, monkeypatch):
    """A mistake that shows after the packing costs no second packing."""
    source = write_tree(tmp_path / "in", {"a/1.jpg": encoded(1), "b/1.jpg": b""})
    with pytest.raises(ValueError, match="every image of class 'b' was refused"):
        build_shards([source], tmp_path / "set")
    assert (tmp_path / "set.partial" / "shard-000000.rows").exists()
    assert not (tmp_path / "set").exists()


def test_a_strangers_file_is_not_removed(breast, tmp_path):
    write_tree(tmp_path, {"set.partial/thesis.tex": b"years of work"})
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        build_shards([breast], tmp_path / "set", **SETTINGS)
    assert (tmp_path / "set.partial" / "thesis.tex").read_bytes() == b"years of work"


def test_two_builds_at_once_are_refused(breast, tmp_path):
    with staging.partial_folder(tmp_path / "set") as partial:
        with pytest.raises(ValueError, match="another build"):
            build_shards([breast], tmp_path / "set", **SETTINGS)
        assert partial.exists()  # the first build goes on
    build_shards([breast], tmp_path / "set", **SETTINGS)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(breast, tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: type("usage", (), {"free": 50_000})())
    with pytest.raises(ValueError, match=r"has 50 KB free, and the set needs [0-9.]+ [KM]B"):
        build_shards([breast], tmp_path / "new" / "set", **SETTINGS)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_disk_that_fills_up_is_one_sentence_and_the_build_goes_on_later(breast, shards, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        monkeypatch.setattr(packing, "check_space", lambda *arguments: None)
        with pytest.raises(OSError, match="No space left") as caught:
            build_shards([breast], small / "set", **SETTINGS)
        assert caught.value.filename
        assert not (small / "set").exists()
        assert not list((small / "set.partial").glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
        build_shards([breast], small / "set", **SETTINGS)
        assert folder_bytes(small / "set") == folder_bytes(shards)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_target_that_cannot_be_written_is_one_sentence(breast, tmp_path, monkeypatch):
    def refuse(self, *arguments, **settings):
        raise PermissionError(30, "Read-only file system", str(self))

    monkeypatch.setattr(staging.Path, "mkdir", refuse)
    with pytest.raises(OSError, match="Read-only"):
        build_shards([breast], tmp_path / "set", **SETTINGS)


def test_a_file_that_cannot_be_read_is_quarantined(breast, tmp_path, monkeypatch):
    read = FileReader.read

    def fail_once(self, container, path, offset, size):
        if path.endswith(b"(3).png"):
            raise OSError(5, "Input/output error")
        return read(self, container, path, offset, size)

    monkeypatch.setattr(FileReader, "read", fail_once)
    summary = build_shards([breast], tmp_path / "set", **SETTINGS)
    assert summary.quarantined == 3
    assert any("Input/output error" in note for note in summary.notes), summary.notes
