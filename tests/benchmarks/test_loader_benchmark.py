import itertools

import numpy as np
import pytest
import worker
from contenders.loader import LOADERS, Files, Task, TwoViews, measure, torchvision_transform, whole_epochs
from loader import Config, report_of, summarise_parts, summary_of, task_of

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
PARTS = {"reading": [1, 1, 1], "drawing": [1, 3, 2], "decoding": [20, 20, 20], "views": [50, 50, 60], "loader": [100, 100, 150]}


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
    assert found["ms"] == {"reading": 1, "drawing": 2, "decoding": 20, "views": 50, "loader": 100}
    assert found["share"] == 0.02  # of 2/100, 4/100 and 3/150
    assert found["patches_per_s"] == pytest.approx(1000 / 3)  # of 500, 250 and 333
    assert found["rest_ms"] == 28  # of 28, 26 and 67


def test_targets(head):
    timed = {"image_size": SIZE, "batch_size": BATCH, "warm": 2, "lap": 4, "seconds": 5.0, "rounds": 3}
    head["images"] = {"patches": 12, "kilobytes": 1.5, "drawn": True}
    more = {"parts": [{"ms": PARTS}], "memory": [{"resident_bytes": [5, 1000, 1051], "peak_bytes": 2}]}
    for device, expected in (("cpu", [True, True, True, True, False, False]), ("cuda", [False])):
        record = report_of(head | {"timed": timed | {"device": device}, "runs": RUNS | more}).record
        assert [target["enough"] for target in record["targets"]] == expected
    assert record["memory"]["growth"] == 1.051


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


@pytest.mark.parametrize(("steps", "cores", "lap"), [(7, 2, 8), (8, 2, 8), (1, 64, 64)])
def test_every_worker_makes_as_many_batches(steps, cores, lap):
    assert task_of(Config("w", batch_size=BATCH), ".", steps * BATCH + 1, cores).lap == lap


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


def test_torchvision_makes_two_views(shards):
    files = ShardReader(shards).manifest["source"].to_pylist()
    data = Files(files, TwoViews(torchvision_transform("simclr-blur", SIZE)))
    one, other = data[PATCHES - 1]
    assert one.shape == other.shape == (3, SIZE, SIZE) and not one.equal(other) and "GaussianBlur" in repr(data.make.transform)
    assert "GaussianBlur" not in repr(torchvision_transform("simclr", SIZE))


def test_others_are_timed_by_whole_epochs():
    numbers = itertools.count()
    stream = whole_epochs(lambda: ((next(numbers),) for _ in range(3)), _task(warm=2, lap=3))
    # The first epoch is over when the first batch comes, and no batch of the next one is made before the clock starts.
    assert [next(stream) for _ in range(2)] == [(2,)] * 2 and next(numbers) == 3
    assert [next(stream) for _ in range(6)] == [(number,) for number in range(4, 10)]
    with pytest.raises(ValueError, match="its epoch has 2 batches, not 3"):
        next(whole_epochs(lambda: iter([()] * 2), _task(warm=2, lap=3)))
