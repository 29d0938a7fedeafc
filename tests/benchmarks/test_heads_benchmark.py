import heads
import numpy as np
import pytest
from heads import Config, Task, drawn, main, measure, other_loss, ours, plain, report_of, tasks_of


def _run(seconds, loss=0.7):
    return {"seconds": seconds, "validation_loss": loss}


def test_tasks_are_nested_shares_of_both_parts():
    small = Task(rows=160, features=20, epochs=30, cores=1)
    grid = tasks_of(small, grid=True)
    sizes = [(len(task.rows), len(task.validation), task.seed) for task in grid[::5]]
    assert sizes == [(8, 2, 0), (40, 10, 0), (80, 20, 0), (160, 40, 0)]
    assert [task.seed for task in grid] == [0, 1, 2, 3, 4] * 4
    features, labels = drawn(small)
    assert features.shape == (200, 20) and features.min() == 0 and set(labels) == {0, 1, 2}


def test_ours_and_the_plain_loop_come_to_the_same_loss():
    task = Task(rows=400, features=20, epochs=60, cores=1)
    theirs, mine = (measure(train, task, grid=False) for train in (plain, ours))
    assert other_loss("ours one", mine, {"plain one": [theirs]}) is None
    assert theirs["validation_loss"] < np.log(3)


def test_the_targets_are_for_one_size(head):
    runs = {"plain one": [_run(9.0)], "ours one": [_run(3.0)], "ours grid": [_run(20.1)]}
    for rows, enough in ((3696, [True, False]), (3695, [None, None])):
        record = report_of(head | {"timed": {"rows": rows, "features": 2048, "epochs": 100}, "runs": runs}).record
        assert [target["enough"] for target in record["targets"]] == enough
        assert record["summary"]["plain one"]["time_to_ours"] == 3


@pytest.mark.parametrize("loss", [0.5, float("nan")])
def test_another_loss_is_a_failure(tmp_path, monkeypatch, run_main, loss):
    monkeypatch.setattr(heads, "run_contender", lambda module, name, task: _run(1, loss if name == "ours grid" else 0.7))
    record, _, code = run_main(main, Config(out=str(tmp_path), rounds=1))
    why = f"its validation loss is {loss}, that of 4 fractions (5, 25, 50, 100 %) x 5 seeds: plain torch loop 0.7"
    assert code == 1 and record["failed"] == {"ours grid": why} and "ours grid" not in record["summary"]
