import subprocess
import sys
from pathlib import Path

import numpy as np
import packing
import pytest
from contenders.packing import Task
from drawn_images import image_files
from harness import RunFailed
from packing import memory_report, note_peaks, one_run, speed_report, summary_of
from PIL import Image


def test_few_pictures_and_no_equal_files(images):
    files = [Path(path) for path, _ in image_files(images)]
    assert len({path.read_bytes() for path in files}) == len(files) == 12
    by_number = {int(path.stem): np.asarray(Image.open(path)) for path in files}
    for i in range(12):
        same = [j for j in range(12) if np.array_equal(by_number[i], by_number[j])]
        assert same == [j for j in range(12) if j % 3 == i % 3]
    classes = sorted({path.relative_to(images).parts[0] for path in files})
    assert all(classes[label] == Path(path).relative_to(images).parts[0] for path, label in image_files(images))


def _runs(rates, seconds):
    return [{"patches_per_s": r, "counted_s": s, "start_s": 0.5, "sync_s": 0.25} for r, s in zip(rates, seconds, strict=True)]


RUNS = {
    "decode-dali": _runs([100, 100, 1000], [1, 1, 1]),
    "decode-nvimgcodec": _runs([200, 400, 100], [1, 1, 1]),  # the faster by its median
    "ours-decode": _runs([160, 300, 90], [3, 4, 5]),
    "ours-header": _runs([500, 900, 800], [6, 8, 20]),
    "tar": _runs([1, 1, 1], [1, 4, 5]),
    "webdataset": _runs([100, 300, 50], [1, 1, 1]),
}


def test_ratios_and_targets(head):
    summary = summary_of(RUNS)
    assert summary["ours-decode"]["rate_to_decode"] == 0.8  # of 0.8, 0.75 and 0.9
    assert summary["ours-header"]["time_to_tar"] == 4  # of 6, 2 and 4
    assert summary["ours-header"]["rate_to_webdataset"] == 5  # of 5, 3 and 16
    assert summary["decode-dali"]["rate_to_decode"] == 0.5  # of 0.5, 0.25 and 10
    assert summary["decode-dali"]["time_to_tar"] is None  # it writes nothing
    images = {"patches": 12, "bytes": 1200}
    record = speed_report(head | {"runs": RUNS, "images": images}).record
    assert [target["enough"] for target in record["targets"]] == [True, False, True]


def test_bytes_per_patch_are_beyond_the_base(head):
    rows = [
        {"patches": 100, "image_bytes": 9, "parent_bytes": 5_000_000, "child_bytes": 3_000_000, "wall_s": 1},
        {"patches": 1100, "image_bytes": 9, "parent_bytes": 5_250_000, "child_bytes": 3_000_000, "wall_s": 1},
    ]
    cells = [row[2:6] for row in memory_report(head | {"memory": rows}).blocks[1].rows]
    assert cells == [["5.0", "-", "3.0", "-"], ["5.2", "250", "3.0", "0"]]
    rows[0]["child_bytes"] = 0  # so few that no child was started
    assert memory_report(head | {"memory": rows}).blocks[1].rows[1][5] == "-"


def test_the_peak_of_a_grandchild_is_its_own():
    """A process that is started by a large one, and one that has already let its memory go again."""
    grandchild = "x = bytearray(b'x') * 40_000_000; del x; print('let go', flush=True); input()"
    child = (
        "import subprocess, sys; x = bytearray(b'x') * 120_000_000\n"
        f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); input(); p.communicate(b'\\n')"
    )
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    peaks: dict[int, int] = {}
    try:
        inner = int(process.stdout.readline())
        note_peaks(process.pid, peaks)
    finally:
        process.communicate(b"\n")
    assert set(peaks) == {process.pid, inner}
    assert 40e6 < peaks[inner] < 100e6 and peaks[process.pid] > 120e6


def test_a_packer_is_timed_until_its_output_is_on_the_disk(tmp_path, monkeypatch):
    task = Task("images", str(tmp_path), 1)
    monkeypatch.setattr(packing, "sync_tree", lambda folder: 2.0)
    monkeypatch.setattr(packing, "run_process", lambda *_: {"patches": 12, "work_s": 0.0})
    (tmp_path / "shard.tar").write_bytes(b"x" * 100)
    found = one_run("ours-header", task, 12, 100)
    assert found["counted_s"] == pytest.approx(found["start_s"] + found["work_s"] + 2.0)
    assert found["patches_per_s"] == pytest.approx(12 / found["counted_s"])
    with pytest.raises(RunFailed, match="the output is smaller than the images"):
        one_run("ours-header", task, 12, 101)
    with pytest.raises(RunFailed, match="12 of 13 patches are there"):
        one_run("ours-header", task, 13, 100)
