import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

import loader_contenders  # noqa: E402
from loader_contenders import CONTENDERS, Task, measure  # noqa: E402
from loader_peers import NOT_TO_BE_HAD, PEER_CONTENDERS, PEERS, whole_epochs  # noqa: E402
from loader_report import Target, judge, judged, markdown, summarise, summarise_parts, tables, target_lines  # noqa: E402
from packing_images import draw_images  # noqa: E402
from step_peers import Environment  # noqa: E402

from benchmarks.loader import NAMES, Config, chosen, environments, main, of_device, the_task  # noqa: E402
from pipelines.shard_reader import ShardReader  # noqa: E402
from sharding.packing import build_shards  # noqa: E402

PATCHES, SIZE, BATCH = 12, 32, 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    images = draw_images(folder, patches=PATCHES, size=SIZE, distinct=3, quality=90, workers=1)
    return build_shards([images], folder / "shards", unlabelled=True).out


def _task(shards="", **settings) -> Task:
    usual = {"cores": 1, "batch_size": BATCH, "image_size": SIZE, "warm": 1, "lap": 2, "seconds": 0.0, "rounds": 1}
    return Task(str(shards), **(usual | settings))


# What is made of the figures


def _runs(*rates):
    return [{"patches_per_s": rate} for rate in rates]


RUNS = {
    "torchvision": _runs(100, 100, 10),
    "torchvision-blur": _runs(50, 40, 60),
    "ours": _runs(500, 300, 400),
    "ours-blur": _runs(200, 200, 300),
    "ours-pathology": _runs(300, 200, 100),
    "dali": _runs(400, 400, 400),
    "dali-blur": _runs(100, 50, 100),
    "decode": _runs(1000, 1000, 1000),
}
PARTS = {"reading": [1, 1, 1], "drawing": [1, 3, 2], "rows": [5, 5, 5], "decoding": [20, 20, 20], "views": [50, 50, 60]}
PARTS |= {"loader": [100, 100, 150]}


def test_ratios_are_of_the_same_round():
    summary = summarise(RUNS)
    assert summary["ours"]["patches_per_s"] == 400
    assert summary["ours"]["spread"] == 0.5
    assert summary["ours"]["rate_to_torchvision"] == 5  # of 5, 3 and 40
    assert summary["ours"]["rate_to_dali"] == 1  # of 1.25, 0.75 and 1
    assert summary["ours"]["rate_to_decode"] == 0.4  # of 0.5, 0.3 and 0.4
    assert summary["ours-blur"]["time_to_ours"] == 1.5  # of 2.5, 1.5 and 4/3


def test_who_blurs_is_held_against_who_blurs():
    summary = summarise(RUNS)
    assert summary["ours-blur"]["rate_to_torchvision"] == 5  # of 4, 5 and 5
    assert summary["ours-blur"]["rate_to_dali"] == 3  # of 2, 4 and 3
    assert summary["ours-pathology"]["rate_to_dali"] == 0.5  # of 0.75, 0.5 and 0.25


@given(
    st.lists(st.tuples(*[st.floats(1, 1e4)] * 3), min_size=1, max_size=5).flatmap(
        lambda rounds: st.tuples(st.just(rounds), st.lists(st.floats(0.1, 10), min_size=len(rounds), max_size=len(rounds)))
    )
)
def test_a_slow_round_for_all_changes_no_ratio(drawn):
    rounds, slower = drawn
    names = ("torchvision", "ours", "dali")
    steady = summarise({name: _runs(*rates) for name, rates in zip(names, zip(*rounds, strict=True), strict=True)})
    scaled = [tuple(rate * factor for rate in rates) for rates, factor in zip(rounds, slower, strict=True)]
    found = summarise({name: _runs(*rates) for name, rates in zip(names, zip(*scaled, strict=True), strict=True)})
    for name, ratio in itertools.product(names, ("rate_to_torchvision", "rate_to_dali", "time_to_ours")):
        assert found[name][ratio] == pytest.approx(steady[name][ratio])


def test_who_failed_later_is_paired_by_round_and_who_never_ran_has_no_row():
    summary = summarise(RUNS | {"torchvision": _runs(250), "dali": []})
    assert summary["ours"]["rate_to_torchvision"] == 2
    assert summary["ours"]["rate_to_dali"] is None
    assert "dali" not in summary


def test_parts_are_added_up_within_a_round():
    found = summarise_parts(PARTS)
    assert found["ms"] == {"reading": 1, "drawing": 2, "rows": 5, "decoding": 20, "views": 50, "loader": 100}
    assert found["share"] == 0.02  # of 2/100, 4/100 and 3/150
    assert found["patches_per_s"] == pytest.approx(1000 / 3)  # of 500, 250 and 333
    assert found["rest_ms"] == 23  # of 23, 21 and 62


@pytest.mark.parametrize(("at_least", "enough"), [(True, [False, True, True]), (False, [True, True, False])])
def test_a_target_is_reached_by_equality(at_least, enough):
    target = Target("ours", "spread", 2.0, at_least, "")
    assert [judge({"ours": {"spread": value}}, [target])[0]["enough"] for value in (1.9, 2.0, 2.1)] == enough
    assert judge({"ours": {"spread": None}}, [target])[0]["enough"] is None
    assert judge({}, [target])[0]["enough"] is None


def _record(runs, failed=(), device="cpu", missing=()) -> dict:
    timed = {"image_size": SIZE, "batch_size": BATCH, "warm": 2, "lap": 4, "seconds": 5.0, "rounds": 3, "device": device}
    machine = {"cpu": "one", "cores": 2, "workers": 2, "memory_bytes": None, "load": [0.0]}
    record = {"date": "2001-01-01", "machine": machine, "commit": "c0ffee", "command": "python loader.py", "versions": {}}
    record |= {"images": {"patches": 12, "kilobytes": 1.5, "drawn": True}, "timed": timed, "runs": runs, "failed": dict(failed)}
    record["missing"] = dict(missing)
    return record | judged(record)


def _memory(*megabytes):
    return [{"resident_bytes": [m * 10**6 for m in megabytes], "peak_bytes": 2 * 10**9}]


EVERYTHING = copy.deepcopy(RUNS) | {"parts": [{"ms": PARTS}], "memory 256": _memory(500, 1000, 1050)}


def test_targets_are_told_one_by_one():
    lines = target_lines(_record(EVERYTHING | {"memory 1024": _memory(500, 1000, 1051)}))
    words = ["reached", "reached", "reached", "reached", "MISSED", "reached", "MISSED"]
    assert [line.partition(":")[0] for line in lines] == words
    assert "torchvision's: 5, wanted at least 4" in lines[0]
    assert "ours without: 1.5, wanted at most 2" in lines[2]
    assert "one core: 333, wanted at least 60,000" in lines[4]
    assert "batch 1,024" in lines[6]


def test_a_gpu_is_held_against_decoding_alone():
    record = _record(RUNS, device="cuda", missing={"kornia": "not installed: kornia"})
    assert target_lines(record) == [
        "MISSED: ours, its rate as a share of decoding alone: 0.4, wanted at least 0.8",
        "kornia on decoded tensors: not installed: kornia",
    ]


def test_what_the_index_does_not_have_is_told():
    lines = target_lines(_record(RUNS, missing=NOT_TO_BE_HAD | {"litdata": "not installed: pip: no network"}))
    assert lines[5].startswith("solo-learn: not installed: the newest release")
    assert lines[6] == "litdata, torchvision on Pillow, a process per core: not installed: pip: no network"


def test_what_was_not_run_is_not_reached():
    assert [line.partition(":")[0] for line in target_lines(_record({"ours": RUNS["ours"]}))] == ["not measured"] * 5


def test_who_could_not_run_stands_in_the_table_with_the_reason():
    failed = {"dali": "exit code 1: no DALI", "parts": "it broke", "memory 256": "exit code -9: it said nothing"}
    text = markdown(_record(EVERYTHING | dict.fromkeys(failed, ()), failed))
    assert "| DALI's own operators, approximate (FAILED: exit code 1: no DALI) | - | - | - | - | - | - | - | - | - |" in text
    assert "| all parts (FAILED: it broke) | - | - |" in text
    assert "| 256 (FAILED: exit code -9: it said nothing) | - | - | - | - |" in text
    assert text.count("- not measured: ") == 4


def test_the_tables_hold_the_figures():
    speed, parts, memory = tables(_record(EVERYTHING))
    assert speed[2][2] == ["ours, simclr", "500", "300", "400", "400", "50%", "5.00", "1.00", "0.40", "1.00"]
    assert parts[2][1] == ["drawing both views' parameters (draw_views)", "2.0000", "2.00%"]
    assert parts[2][-2:] == [["whatever else it does", "23.0000", "23.00%"], ["the whole loader", "100.0000", "100.00%"]]
    assert memory[2] == [["256", "1,000", "1,050", "1.050", "2,000"]]


# The clock


def test_whole_laps_are_timed_after_the_first_batches(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(loader_contenders.time, "perf_counter", lambda: clock["now"])

    def stream():
        for number in itertools.count():
            clock["now"] += 100 if number < 3 else 1  # seconds that a batch takes
            yield [range(BATCH)] * 2

    found = measure(stream(), _task(warm=3, lap=5, seconds=11))
    assert found == {"patches_per_s": BATCH, "patches": 15 * BATCH, "batches": 15, "wall_s": 15}
    assert measure(stream(), _task(warm=3, lap=5, seconds=0))["batches"] == 5  # never nothing


@given(st.integers(1, 200), st.integers(1, 64))
def test_every_worker_makes_as_many_batches(steps, cores):
    class Reader:
        folder = "."

        def __len__(self):
            return steps * BATCH + 1

    task = the_task(Config("w", batch_size=BATCH), Reader(), cores)  # type: ignore[arg-type]
    assert task.warm % cores == task.lap % cores == 0
    assert 2 <= task.warm < 2 + cores
    assert steps <= task.lap < steps + cores


def test_a_lap_may_be_shorter_than_an_epoch():
    class Reader:
        folder = "."

        def __len__(self):
            return 100 * BATCH

    assert the_task(Config("w", batch_size=BATCH, lap=5), Reader(), 4).lap == 8  # type: ignore[arg-type]


# The contenders


@pytest.mark.parametrize("name", ["ours", "ours-blur", "ours-pathology", "dali", "dali-blur"])
def test_two_views_of_every_patch(shards, name):
    stream = CONTENDERS[name].stream(_task(shards))
    for views in itertools.islice(stream, PATCHES // BATCH + 1):  # beyond an epoch
        both = [np.asarray(part.as_tensor() if hasattr(part, "as_tensor") else part) for part in views]
        assert [(view.shape, view.dtype) for view in both] == [((BATCH, 3, SIZE, SIZE), np.float32)] * 2
        assert np.abs(both[0] - both[1]).mean() > 0.05
        assert -3 < both[0].min() < both[0].max() < 3  # normalised by ImageNet's figures
    stream.close()


@pytest.mark.parametrize("recipe", ["simclr", "simclr-blur"])
def test_torchvision_makes_two_views_of_every_file(shards, recipe):
    files = ShardReader(shards).manifest["source"].to_pylist()
    data = loader_contenders._TwoViews(files, loader_contenders._torchvision_transform(recipe, SIZE))
    assert len(data) == PATCHES
    one, other = data[PATCHES - 1]
    assert one.shape == other.shape == (3, SIZE, SIZE)
    assert not one.equal(other)
    assert ("GaussianBlur" in repr(data.transform)) == (recipe == "simclr-blur")


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 8))
def test_batches_hold_every_file_before_any_comes_again(patches, batch_size, count):
    batches = list(loader_contenders._Batches(patches, batch_size, count))
    assert [len(batch) for batch in batches] == [batch_size] * count
    places = list(itertools.chain.from_iterable(batches))
    for start in range(0, len(places), patches):
        part = places[start : start + patches]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(patches))


def test_torchvision_makes_two_views_of_decoded_tensors(shards):
    stream = CONTENDERS["torchvision-v2"].stream(_task(shards))
    for views in itertools.islice(stream, PATCHES // BATCH + 1):
        assert [(view.shape, view.dtype) for view in views] == [((BATCH, 3, SIZE, SIZE), torch.float32)] * 2
        flat = torch.stack(list(views)).flatten(2)
        assert len(flat.mean(-1).unique()) == 2 * BATCH  # each drawn by itself
        assert -3 < flat.min() < flat.max() < 3
    stream.close()


def test_each_device_has_its_own():
    assert set(of_device("cuda")) ^ set(of_device("cpu")) >= {"torchvision-v2", "kornia", "decode-on-host", "parts", "memory"}
    assert {"ours", "ours-blur", "torchvision", "dali", "decode"} <= set(of_device("cuda")) & set(of_device("cpu"))


@pytest.mark.parametrize("name", ["decode", "decode-on-host"])
def test_decoding_goes_on_after_an_epoch(shards, name):
    stream = CONTENDERS[name].stream(_task(shards))
    images = [np.asarray(batch[0].as_tensor()) for batch in itertools.islice(stream, 2 * PATCHES // BATCH)]
    assert {image.shape for image in images} == {(BATCH, SIZE, SIZE, 3)}
    half = len(images) // 2
    sums = [sorted(np.concatenate(part).sum((1, 2, 3)).tolist()) for part in (images[:half], images[half:])]
    assert sums[0] == sums[1]  # every patch once in each epoch
    stream.close()


# Other packages' loaders


def test_others_are_timed_by_whole_epochs():
    numbers = itertools.count()
    stream = whole_epochs(lambda: ((next(numbers),) for _ in range(3)), _task(warm=2, lap=3))
    # The first epoch is over when the first batch comes, and no batch of the next one is made before the clock starts.
    assert [next(stream) for _ in range(2)] == [(2,)] * 2 and next(numbers) == 3
    assert [next(stream) for _ in range(6)] == [(number,) for number in range(4, 10)]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_an_epoch_of_another_length_is_no_lap(count):
    with pytest.raises(ValueError, match=f"its epoch has {count} batches, not 3"):
        next(whole_epochs(lambda: iter([()] * count), _task(warm=2, lap=3)))


def test_others_run_where_they_are_asked_for():
    assert set(PEER_CONTENDERS) == set(PEERS) and not set(PEERS) & set(CONTENDERS)
    assert not set(PEERS) & {*of_device("cpu"), *of_device("cuda")} and not set(NOT_TO_BE_HAD) & set(NAMES)


def test_each_has_an_environment_of_its_own(tmp_path):
    for name, version in (("litdata", "1.2.3"), ("spdl", "4.5.6")):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").write_text(f"#!/bin/sh\necho {version}\n")
        (tmp_path / name / "bin" / "python").chmod(0o755)
        found = environments(str(tmp_path), name)
        assert found == Environment(str(tmp_path / name / "bin" / "python"), {name: version}, {})


def test_another_loader_runs_beside_ours(tmp_path):
    done, (record,) = _run(tmp_path, "--rounds", 1, "--contenders", "webdataset", "litdata", "ours")
    assert done.returncode == 0, done.stdout + done.stderr
    assert record["missing"] == {"litdata": "not installed: --peers FOLDER does that"}
    assert record["versions"]["webdataset"][0].isdigit()
    assert {name: len(runs) for name, runs in record["runs"].items()} == {"ours": 1, "webdataset": 1}
    assert record["runs"]["webdataset"][0]["batches"] % 3 == 0


# The command


def _run(work: Path, *arguments: object) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The process, and the records that it left."""
    usual = ["--work", work, "--out", work / "results", "--patches", PATCHES, "--size", SIZE, "--batch-size", BATCH]
    command = [sys.executable, "benchmarks/loader.py", *map(str, [*usual, "--seconds", 0.1, "--cores", 1, *arguments])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200, check=False)
    return done, [json.loads(path.read_text()) for path in sorted((work / "results").glob("*.json"))]


def test_the_record_holds_what_the_table_says(tmp_path):
    arguments = ["--rounds", 1, "--contenders", "parts", "dali", "torchvision", "ours", "memory", "--memory-batches", 4, 100]
    done, (record,) = _run(tmp_path, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr  # there is no batch of 100
    assert done.stderr.endswith("FAILED: memory 100\n")
    assert [*record["runs"]] == ["torchvision", "ours", "dali", "parts", "memory 4", "memory 100"]
    for name in ("torchvision", "ours", "dali"):
        (run,) = record["runs"][name]
        assert run["batches"] % 3 == 0 and run["patches"] == run["batches"] * BATCH
        assert run["wall_s"] >= 0.1
        assert run["patches_per_s"] == pytest.approx(run["patches"] / run["wall_s"])
    ms = {name: times[0] for name, times in record["runs"]["parts"][0]["ms"].items()}
    assert 0 < ms["reading"] < ms["drawing"] < ms["loader"]
    assert ms["decoding"] + ms["views"] < ms["loader"]
    (run,) = record["runs"]["memory 4"]
    assert len(run["resident_bytes"]) == 10
    assert all(100e6 < resident <= run["peak_bytes"] for resident in run["resident_bytes"])
    assert "larger than the" in record["failed"]["memory 100"]
    (path,) = (tmp_path / "results").glob("*-loader.md")
    assert path.read_text() == markdown(record)
    assert f"| ours, simclr | {record['runs']['ours'][0]['patches_per_s']:,.0f} |" in path.read_text()
    assert "100 (FAILED: exit code 1: ValueError: batch size 100 is larger" in path.read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contenders": ["albumentations"]}, "no contender 'albumentations'"),
        ({"images": "no/such/folder"}, "no/such/folder: there is no such folder"),
        ({"rounds": 0}, "--rounds 0 is out of range"),
        ({"patches": 255}, "--patches 255 is out of range: give at least 256"),
        ({"cores": 10_000}, "--cores 10000 is out of range"),
        ({"lap": 0}, "--lap 0 is out of range"),
    ],
)
def test_slips_are_told(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        main(Config(str(tmp_path), str(tmp_path / "results"), **settings))
    assert not (tmp_path / "results").exists()


def test_too_few_real_images(tmp_path, shards):
    (images,) = (path for path in shards.parent.iterdir() if path.name.startswith("images-"))
    with pytest.raises(ValueError, match="12 patches are fewer than --batch-size 256"):
        main(Config(str(tmp_path), str(tmp_path / "results"), images=str(images)))


def test_contenders_keep_their_order():
    assert chosen(["memory", "dali", "ours"], NAMES) == ["ours", "dali", "memory"]
    assert chosen([], NAMES) == list(NAMES)
