import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

import packing_contenders  # noqa: E402
from packing_images import draw_images, image_files  # noqa: E402
from packing_report import judge, memory_table, speed_lines, summarise  # noqa: E402
from packing_runs import note_peaks  # noqa: E402

from benchmarks.packing import Config, absent, chosen, main, new_path  # noqa: E402

PATCHES, DISTINCT = 7, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    return draw_images(folder, patches=PATCHES, size=16, distinct=DISTINCT, quality=85, workers=1)


# The images


def test_few_pictures_and_no_equal_files(images):
    files = [Path(path) for path, _ in image_files(images)]
    assert len({path.read_bytes() for path in files}) == len(files) == PATCHES
    by_number = {int(path.stem): Image.open(path) for path in files}
    pixels = [np.asarray(by_number[i]) for i in range(PATCHES)]
    assert pixels[0].shape == (16, 16, 3)
    assert [by_number[i].info["comment"] for i in range(2)] == [b"000000000000", b"000000000001"]
    for i in range(PATCHES):
        same = [j for j in range(PATCHES) if np.array_equal(pixels[i], pixels[j])]
        assert same == [j for j in range(PATCHES) if j % DISTINCT == i % DISTINCT]


def test_labels_are_the_first_folders(images):
    classes = sorted({Path(path).relative_to(images).parts[0] for path, _ in image_files(images)})
    assert len(classes) > 1
    assert all(classes[label] == Path(path).relative_to(images).parts[0] for path, label in image_files(images))


def test_images_are_drawn_once(images):
    before = {path: path.stat().st_mtime_ns for path in images.rglob("*.jpg")}
    again = draw_images(images.parent, patches=PATCHES, size=16, distinct=DISTINCT, quality=85, workers=1)
    assert again == images
    assert {path: path.stat().st_mtime_ns for path in images.rglob("*.jpg")} == before


# The contenders


@pytest.mark.parametrize("name", ["webdataset", "webdataset-pillow"])
def test_shard_writer_stores_the_files_and_their_labels(images, tmp_path, name):
    run = packing_contenders.CONTENDERS[name].run
    assert run(packing_contenders.Task(str(images), str(tmp_path), 1, "")).patches == PATCHES
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
        assert {member.mtime for member in tar} == {0}
    expected = list(image_files(images))
    assert [members[f"{i:09d}.jpg"] for i in range(PATCHES)] == [Path(path).read_bytes() for path, _ in expected]
    assert [int(members[f"{i:09d}.cls"]) for i in range(PATCHES)] == [label for _, label in expected]


def test_pillow_is_asked_about_every_file(images, tmp_path):
    cut = _copy_with_a_bad_file(images, tmp_path / "cut")
    task = packing_contenders.Task(str(cut), str(tmp_path), 1, "")
    packing_contenders.webdataset(task)
    with pytest.raises(OSError, match="cannot identify"):
        packing_contenders.webdataset_pillow(task)


@pytest.mark.parametrize(("name", "workers"), [("decode-dali", 1), ("decode-nvimgcodec", 2)])
def test_bare_decoders_decode_every_file(images, tmp_path, name, workers):
    work = packing_contenders.CONTENDERS[name].run(packing_contenders.Task(str(images), str(tmp_path), workers, ""))
    assert work.patches == PATCHES
    assert work.work_s > 0


def test_what_is_not_installed_is_said(monkeypatch):
    other = packing_contenders.Contender("another", None, "not_there.at_all", "not-there")
    monkeypatch.setitem(packing_contenders.CONTENDERS, "other", other)
    assert absent(["webdataset", "other"]) == {"other": "not installed: pip install not-there"}


# What is made of the figures


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


def test_ratios_are_of_the_same_round():
    summary = summarise(RUNS)
    assert summary["ours-decode"]["patches_per_s"] == 160
    assert summary["ours-decode"]["rate_to_decode"] == 0.8  # of 0.8, 0.75 and 0.9
    assert summary["ours-header"]["time_to_tar"] == 4  # of 6, 2 and 4
    assert summary["ours-header"]["rate_to_webdataset"] == 5  # of 5, 3 and 16
    assert summary["decode-dali"]["rate_to_decode"] == 0.5  # of 0.5, 0.25 and 10
    assert summary["decode-dali"]["time_to_tar"] is None  # it writes nothing


def test_a_target_is_reached_missed_or_not_measured():
    record = {"targets": judge(summarise(RUNS)), "failed": {"tar": "it broke"}, "missing": {"litdata": "not installed"}}
    decode, tar, writer, failed, missing = speed_lines(record)
    assert decode.startswith("reached: ours with --check decode") and "0.80, wanted at least 0.8" in decode
    assert tar.startswith("MISSED: ours with --check header") and "4.00, wanted at most 3" in tar
    assert writer.startswith("reached")
    assert failed.startswith("FAILED: GNU tar") and failed.endswith("it broke")
    assert missing.endswith("not installed")
    targets = judge(summarise({name: found for name, found in RUNS.items() if name != "tar"}))
    assert [target["enough"] for target in targets] == [True, None, True]


def test_a_contender_that_failed_later_is_paired_by_round():
    summary = summarise(RUNS | {"ours-header": RUNS["ours-header"][:1], "ours-decode": []})
    assert summary["ours-header"]["time_to_tar"] == 6
    assert "ours-decode" not in summary


def test_bytes_per_patch_are_beyond_the_base():
    rows = [
        {"patches": 100, "image_bytes": 9, "parent_bytes": 5_000_000, "child_bytes": 3_000_000, "wall_s": 1},
        {"patches": 1100, "image_bytes": 9, "parent_bytes": 5_250_000, "child_bytes": 3_000_000, "wall_s": 1},
    ]
    assert [row[2:6] for row in memory_table(rows)[1]] == [["5.0", "-", "3.0", "-"], ["5.2", "250", "3.0", "0"]]
    rows[0]["child_bytes"] = 0  # so few that no child was started
    assert memory_table(rows)[1][1][2:6] == ["5.2", "250", "3.0", "-"]


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
    assert 40e6 < peaks[inner] < 100e6
    assert peaks[process.pid] > 120e6


def test_earlier_results_stay(tmp_path):
    first = new_path(tmp_path, "packing")
    first.touch()
    assert new_path(tmp_path, "packing").name == f"{first.stem}-2.json"


# The command


def _copy_with_a_bad_file(images: Path, out: Path) -> Path:
    for number, (path, _) in enumerate(image_files(images)):
        to = out / Path(path).relative_to(images)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(b"no image, and as long as one is" * 40 if number == 2 else Path(path).read_bytes())
    return out


def _run(work: Path, *arguments: object) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The process, and the records that it left."""
    command = [sys.executable, "benchmarks/packing.py", "--work", str(work), "--out", str(work / "results"), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200, check=False)
    return done, [json.loads(path.read_text()) for path in sorted((work / "results").glob("*.json"))]


def test_rounds_are_interleaved_and_written_down(tmp_path):
    arguments = ["--patches", PATCHES, "--distinct", DISTINCT, "--size", 32, "--rounds", 2, "--workers", 1]
    done, (record,) = _run(tmp_path, *arguments, "--contenders", "tar", "ours-header")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(":")[:2] for line in done.stdout.splitlines() if line.startswith("round ")]
    assert lines == [["round 1", " ours-header"], ["round 1", " tar"], ["round 2", " ours-header"], ["round 2", " tar"]]
    assert record["images"]["patches"] == PATCHES
    for name, runs in record["runs"].items():
        assert len(runs) == 2, name
        for run in runs:
            assert run["counted_s"] == pytest.approx(run["start_s"] + run["work_s"] + run["sync_s"])
            assert run["patches_per_s"] == pytest.approx(PATCHES / run["counted_s"])
    assert record["runs"]["tar"][0]["start_s"] == 0 < record["runs"]["ours-header"][0]["start_s"]
    assert [target["enough"] is None for target in record["targets"]] == [True, False, True]
    (path,) = (tmp_path / "results").glob("*-packing.md")
    assert "| GNU tar, one process |" in path.read_text()
    assert not (tmp_path / "out").exists()


def test_a_contender_without_all_patches_has_no_rate(images, tmp_path):
    cut = _copy_with_a_bad_file(images, tmp_path / "cut")
    done, (record,) = _run(tmp_path, "--images", cut, "--rounds", 1, "--workers", 1, "--contenders", "tar", "ours-header")
    assert done.returncode == 1
    assert done.stderr.endswith("FAILED: ours-header\n")
    assert record["failed"] == {"ours-header": f"{PATCHES - 1} of {PATCHES} patches are there"}
    assert record["runs"]["ours-header"] == [] and len(record["runs"]["tar"]) == 1


def test_memory(tmp_path):
    done, (record,) = _run(tmp_path, "--memory", "--counts", 2000, 40, "--distinct", 2, "--workers", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["patches"] for row in record["memory"]] == [40, 2000]
    assert all(20e6 < row["parent_bytes"] < 2e9 for row in record["memory"])
    assert 20e6 < record["memory"][-1]["child_bytes"] < 2e9  # so few as 40 may need no child
    (path,) = (tmp_path / "results").glob("*-packing-memory.md")
    assert "| 2,000 |" in path.read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contenders": ["rar"]}, "no contender 'rar'"),
        ({"images": "no/such/folder"}, "no/such/folder: there is no such folder"),
        ({"rounds": 0}, "--rounds 0 is out of range"),
        ({"memory": True, "counts": [5, 5]}, "--counts needs at least two"),
    ],
)
def test_slips_are_told(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        main(Config(str(tmp_path), str(tmp_path / "results"), **settings))


def test_contenders_keep_their_order():
    assert chosen(["tar", "decode-dali"], packing_contenders.CONTENDERS) == ["decode-dali", "tar"]
    assert chosen([], packing_contenders.CONTENDERS)[0] in packing_contenders.DECODERS
