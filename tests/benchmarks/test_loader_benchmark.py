import itertools

import numpy as np
import pytest
import torch
import worker
from contenders.loader import LOADERS, Files, Task, TwoViews, measure, torchvision_transform, whole_epochs
from contenders.loader_peers import CONTENDERS as PEER_CONTENDERS
from hypothesis import given
from hypothesis import strategies as st
from loader import Config, environment_in, main, of_device, report_of, summarise_parts, summary_of, task_of
from peers import LOADER_PEERS, Environment

from pipelines.shard_reader import ShardReader

PATCHES, SIZE, BATCH = 12, 32, 4


def _task(shards="", **settings) -> Task:
    usual = {"cores": 1, "batch_size": BATCH, "image_size": SIZE, "warm": 1, "lap": 2, "seconds": 0.0, "rounds": 1}
    return Task(str(shards), **(usual | settings))


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


def test_ratios():
    summary = summary_of(RUNS)
    assert summary["ours"]["patches_per_s"] == 400 and summary["ours"]["spread"] == 0.5
    assert summary["ours"]["rate_to_torchvision"] == 5  # of 5, 3 and 40
    assert summary["ours"]["rate_to_dali"] == 1  # of 1.25, 0.75 and 1
    assert summary["ours"]["rate_to_decode"] == 0.4  # of 0.5, 0.3 and 0.4
    assert summary["ours-blur"]["time_to_ours"] == 1.5  # of 2.5, 1.5 and 4/3
    # Those that blur are compared with those that blur.
    assert summary["ours-blur"]["rate_to_torchvision"] == 5  # of 4, 5 and 5
    assert summary["ours-blur"]["rate_to_dali"] == 3  # of 2, 4 and 3
    assert summary["ours-pathology"]["rate_to_dali"] == 0.5  # of 0.75, 0.5 and 0.25


def test_parts_are_added_up_within_a_round():
    found = summarise_parts(PARTS)
    assert found["ms"] == {"reading": 1, "drawing": 2, "rows": 5, "decoding": 20, "views": 50, "loader": 100}
    assert found["share"] == 0.02  # of 2/100, 4/100 and 3/150
    assert found["patches_per_s"] == pytest.approx(1000 / 3)  # of 500, 250 and 333
    assert found["rest_ms"] == 23  # of 23, 21 and 62


def _report(head, runs, device="cpu"):
    timed = {"image_size": SIZE, "batch_size": BATCH, "warm": 2, "lap": 4, "seconds": 5.0, "rounds": 3, "device": device}
    images = {"patches": 12, "kilobytes": 1.5, "drawn": True}
    return report_of(head | {"images": images, "timed": timed, "runs": runs})


def test_targets(head):
    memory = {
        f"memory {size}": [{"resident_bytes": [5, 1000, last], "peak_bytes": 2}] for size, last in ((256, 1050), (1024, 1051))
    }
    targets = _report(head, RUNS | {"parts": [{"ms": PARTS}]} | memory).record["targets"]
    assert [target["enough"] for target in targets] == [True, True, True, True, False, True, False]
    targets = _report(head, RUNS, device="cuda").record["targets"]
    assert [(target["reached"], target["enough"]) for target in targets] == [(0.4, False)]
    head["failed"] = {"dali": "no DALI", "parts": "it broke", "memory 256": "no memory"}
    blocks = _report(head, RUNS | dict.fromkeys(head["failed"], ())).blocks
    firsts = [row[0] for block in blocks if not isinstance(block, str) for row in block.rows]
    assert {"all parts (FAILED: it broke)", "256 (FAILED: no memory)"} <= set(firsts)


def test_whole_laps_are_timed_after_the_first_batches(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock["now"])

    def stream(task):
        for number in itertools.count():
            clock["now"] += 100 if number < 3 else 1  # seconds that a batch takes
            yield [range(BATCH)] * 2

    found = measure(stream, _task(warm=3, lap=5, seconds=11))
    assert found == {"patches_per_s": BATCH, "patches": 15 * BATCH, "batches": 15, "wall_s": 15}
    assert measure(stream, _task(warm=3, lap=5, seconds=0))["batches"] == 5  # never nothing


@given(st.integers(1, 200), st.integers(1, 64))
def test_every_worker_makes_as_many_batches(steps, cores):
    task = task_of(Config("w", batch_size=BATCH), ".", steps * BATCH + 1, cores)
    assert task.lap % cores == 0 and steps <= task.lap < steps + cores
    assert task_of(Config("w", batch_size=BATCH, lap=5), ".", 100 * BATCH, 4).lap == 8


def _stream(name, shards):
    return LOADERS[name].run.args[0](_task(shards))


@pytest.mark.parametrize("name", ["ours", "dali"])
def test_two_views_of_every_patch(shards, name):
    stream = _stream(name, shards)
    for views in itertools.islice(stream, PATCHES // BATCH + 1):  # beyond an epoch
        both = [np.asarray(part.as_tensor() if hasattr(part, "as_tensor") else part) for part in views]
        assert [(view.shape, view.dtype) for view in both] == [((BATCH, 3, SIZE, SIZE), np.float32)] * 2
        assert np.abs(both[0] - both[1]).mean() > 0.05
        assert -3 < both[0].min() < both[0].max() < 3  # normalised by ImageNet's mean and deviation
    stream.close()


def test_torchvision_makes_two_views_of_files_and_of_tensors(shards):
    files = ShardReader(shards).manifest["source"].to_pylist()
    data = Files(files, TwoViews(torchvision_transform("simclr-blur", SIZE)))
    one, other = data[PATCHES - 1]
    assert one.shape == other.shape == (3, SIZE, SIZE) and not one.equal(other) and "GaussianBlur" in repr(data.make.transform)
    assert "GaussianBlur" not in repr(torchvision_transform("simclr", SIZE))
    stream = _stream("torchvision-v2", shards)
    views = torch.stack(list(next(stream)))
    assert views.shape == (2, BATCH, 3, SIZE, SIZE) and -3 < views.min() < views.max() < 3
    assert len(views.flatten(2).mean(-1).unique()) == 2 * BATCH  # each drawn by itself
    stream.close()


def test_others_are_timed_by_whole_epochs():
    numbers = itertools.count()
    stream = whole_epochs(lambda: ((next(numbers),) for _ in range(3)), _task(warm=2, lap=3))
    # The first epoch is over when the first batch comes, and no batch of the next one is made before the clock starts.
    assert [next(stream) for _ in range(2)] == [(2,)] * 2 and next(numbers) == 3
    assert [next(stream) for _ in range(6)] == [(number,) for number in range(4, 10)]
    with pytest.raises(ValueError, match="its epoch has 2 batches, not 3"):
        next(whole_epochs(lambda: iter([()] * 2), _task(warm=2, lap=3)))


def test_contenders_of_each_device(tmp_path):
    assert set(of_device("cuda")) ^ set(of_device("cpu")) >= {"torchvision-v2", "kornia", "parts", "memory"}
    assert {"ours", "ours-blur", "torchvision", "dali", "decode"} <= set(of_device("cuda")) & set(of_device("cpu"))
    assert set(PEER_CONTENDERS) == set(LOADER_PEERS) and not set(LOADER_PEERS) & {*of_device("cpu"), *of_device("cuda")}
    (tmp_path / "spdl" / "bin").mkdir(parents=True)
    python = tmp_path / "spdl" / "bin" / "python"
    python.write_text("#!/bin/sh\necho 4.5.6\n")
    python.chmod(0o755)
    assert environment_in(str(tmp_path), "spdl") == Environment(str(python), {"spdl": "4.5.6"}, {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"images": "no/such/folder"}, "no/such/folder: there is no such folder"),
        ({"patches": 255}, "--patches 255 is out of range: give at least 256"),
    ],
)
def test_user_errors(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        main(Config(str(tmp_path), str(tmp_path / "results"), **settings))
    assert not (tmp_path / "results").exists()
