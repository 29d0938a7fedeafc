import heads
import numpy as np
import pytest
from harness import RunFailed
from heads import Config, Task, drawn, main, measure, other_loss, ours, plain, report_of, sklearn, tasks_of

TIMED = {"rows": 3696, "features": 2048, "epochs": 100, "classes": 3, "protocol": "adam", "rounds": 3}


def _run(seconds, *losses):
    return {"seconds": seconds, "first_s": 0.5, "validation_losses": list(losses or (0.7,))}


def test_tasks_are_nested_shares_of_both_parts():
    small = Task("grid", "adam", rows=160, features=20, classes=3, epochs=30, cores=1)
    grid = tasks_of(small)
    sizes = [(len(task.rows), len(task.validation), task.seed) for task in grid[::5]]
    assert sizes == [(8, 2, 0), (40, 10, 0), (80, 20, 0), (160, 40, 0)]
    assert [task.seed for task in grid] == [0, 1, 2, 3, 4] * 4
    features, labels = drawn(small)
    assert features.shape == (200, 20) and features.min() == 0 and set(labels) == {0, 1, 2}


@pytest.mark.parametrize("protocol", ["adam", "sgd"])
def test_ours_and_the_plain_loop_come_to_the_same_loss(protocol):
    task = Task("one", protocol, rows=400, features=20, classes=3, epochs=60, cores=1)
    theirs, mine, other = (measure(train, task) for train in (plain, ours, sklearn))
    assert other_loss("ours", mine, {"plain": [theirs]}) is None
    assert theirs["validation_losses"][0] < np.log(3) and other["validation_losses"][0] < np.log(3)


def test_another_loss_is_a_failure():
    assert other_loss("ours", _run(1, 0.5, 0.9), {"plain": [_run(1, 0.7, 0.7)]}) is None  # their mean counts
    why = "its validation loss is 0.5, that of plain torch loop 0.7"
    assert other_loss("ours", _run(1, 0.5), {"plain": [_run(1, 0.7)]}) == why
    assert other_loss("plain", _run(1, float("nan")), {"ours": [_run(1)]}) is not None
    assert other_loss("sklearn", _run(1, 9), {"ours": [_run(1)]}) is None  # another objective


def test_the_targets_are_for_one_size(head):
    runs = {"one": {"ours": [_run(3.0)]}, "grid": {"ours": [_run(20.1)]}}
    for timed, enough in ((TIMED, [True, False]), (TIMED | {"rows": 3695}, [None, None])):
        targets = report_of(head | {"timed": timed, "runs": runs}).record["targets"]
        assert [target["enough"] for target in targets] == enough


def test_rounds_are_interleaved_and_failures_decide_the_exit_code(tmp_path, monkeypatch, run_main):
    order = []

    def run_contender(module, name, task):
        order.append((task.scenario, name))
        if name == "sklearn":
            raise RunFailed("exit code 1: it broke")
        return _run(1, 0.9 if (name, task.scenario) == ("ours", "grid") else 0.7)

    monkeypatch.setattr(heads, "run_contender", run_contender)
    record, _, code = run_main(main, Config(out=str(tmp_path), rounds=1))
    assert code == 1 and order == [(scenario, name) for scenario in ("one", "grid") for name in ("plain", "ours", "sklearn")]
    assert [*record["failed"]] == ["one, round 1: sklearn", "grid, round 1: ours", "grid, round 1: sklearn"]
    assert "ours" not in record["summary"]["grid"]
