import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

from measuring import RunFailed  # noqa: E402

import benchmarks.heads as command  # noqa: E402
from benchmarks.heads import CONTENDERS, Job, drawn, judge, markdown, measure, other_loss, summarise, target_lines, tasks_of  # noqa: E402

TIMED = {"rows": 3696, "features": 2048, "epochs": 100, "classes": 3, "protocol": "adam", "rounds": 3}
SMALL = Job("grid", "adam", rows=160, features=20, classes=3, epochs=30, cores=1)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(seconds, *losses):
    return {"seconds": seconds, "first_s": 0.5, "validation_losses": list(losses or (0.7,))}


def test_tasks_are_nested_shares_of_both_parts():
    (one,) = tasks_of(Job("one", "adam", 160, 20, 3, 30, 1))
    assert one.rows.tolist() == list(range(160)) and one.validation.tolist() == list(range(160, 200))
    grid = tasks_of(SMALL)
    assert [(len(task.rows), len(task.validation), task.seed) for task in grid[::5]] == [
        (8, 2, 0),
        (40, 10, 0),
        (80, 20, 0),
        (160, 40, 0),
    ]
    assert [task.seed for task in grid] == [0, 1, 2, 3, 4] * 4
    features, labels = drawn(SMALL)
    assert features.shape == (200, 20) and features.min() == 0 and set(labels) == {0, 1, 2}


@pytest.mark.parametrize("protocol", ["adam", "sgd"])
def test_ours_and_the_plain_loop_come_to_the_same_loss(protocol):
    job = Job("one", protocol, rows=400, features=20, classes=3, epochs=60, cores=1)
    plain, ours, sklearn = (measure(CONTENDERS[name], job) for name in ("plain", "ours", "sklearn"))
    assert other_loss("ours", ours, {"plain": [plain]}) is None
    assert plain["validation_losses"][0] < np.log(3) and sklearn["validation_losses"][0] < np.log(3)
    assert all(found["seconds"] > 0 and found["first_s"] > 0 for found in (plain, ours, sklearn))
    assert len(measure(CONTENDERS["ours"], SMALL)["validation_losses"]) == 20


def test_another_loss_is_told():
    assert other_loss("ours", _run(1, 0.5, 0.9), {"plain": [_run(1, 0.7, 0.7)]}) is None  # their mean counts
    assert (
        other_loss("ours", _run(1, 0.5), {"plain": [_run(1, 0.7)]}) == "its validation loss is 0.5, that of plain torch loop 0.7"
    )
    assert other_loss("plain", _run(1, float("nan")), {"ours": [_run(1)]}) is not None
    assert other_loss("sklearn", _run(1, 9), {"ours": [_run(1)]}) is None  # another objective


def test_ratios_are_of_the_same_round():
    runs = {
        "one": {"plain": [_run(2), _run(20), _run(6)], "ours": [_run(1), _run(10), _run(1)]},
        "grid": {"plain": [_run(3)], "ours": []},
    }
    summary = summarise(runs)
    assert summary["one"]["plain"]["time_to_ours"] == 2 and summary["one"]["plain"]["seconds"] == 6
    assert summary["grid"] == {"plain": {"seconds": 3, "first_s": 0.5, "time_to_ours": None, "validation_loss": 0.7}}


def test_targets_are_reached_by_equality_and_are_for_one_size():
    summary = summarise({"one": {"ours": [_run(3.0)]}, "grid": {"ours": [_run(20.1)]}})
    assert [target["enough"] for target in judge(summary, TIMED)] == [True, False]
    assert [target["enough"] for target in judge(summary, TIMED | {"rows": 3695})] == [None, None]
    lines = target_lines({"targets": judge(summary, TIMED)})
    assert lines[0] == "reached: ours, 1 head on all rows, s: 3, wanted at most 3"
    assert lines[1].startswith("MISSED: ours, 4 fractions")


def _main(tmp_path, monkeypatch, one_run, **settings):
    """The record and the exit code of a run without processes."""
    monkeypatch.setattr(command, "one_run", one_run)
    code = 0
    try:
        command.main(command.Config(**({"out": str(tmp_path), "rounds": 2} | settings)))
    except SystemExit as error:
        code = error.code
    (path,) = tmp_path.glob("*-heads.json")
    record = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == markdown(record)
    return record, code


def test_rounds_are_interleaved(tmp_path, monkeypatch):
    order = []

    def one_run(name, job):
        order.append((job.scenario, name))
        return _run({"plain": 4, "ours": 2, "sklearn": 1}[name])

    record, code = _main(tmp_path, monkeypatch, one_run)
    assert code == 0 and record["failed"] == {}
    assert order == [(scenario, name) for scenario in ("one", "grid") for name in ("plain", "ours", "sklearn") * 2]
    assert "| 1 head on all rows: plain torch loop | 4.00 | 2.00 | 0.7000 | 0.50 |" in markdown(record)
    assert "- reached: ours, 1 head on all rows, s: 2, wanted at most 3" in markdown(record)


def test_failures_and_other_losses_decide_the_exit_code(tmp_path, monkeypatch):
    def one_run(name, job):
        if name == "sklearn":
            raise RunFailed("exit code 1: it broke")
        return _run(1, 0.9 if (name, job.scenario) == ("ours", "grid") else 0.7)

    record, code = _main(tmp_path, monkeypatch, one_run, rounds=1)
    assert code == 1
    assert [*record["failed"]] == ["sklearn, one, round 1", "ours, grid, round 1", "sklearn, grid, round 1"]
    assert "ours" not in record["summary"]["grid"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contenders": ["keras"]}, "no contender 'keras'"),
        ({"rows": 79}, "--rows 79 is out of range"),
        ({"rounds": 0}, "--rounds 0 is out of range"),
        ({"cores": 10_000}, "--cores 10000 is out of range"),
    ],
)
def test_slips_are_told(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        command.main(command.Config(out=str(tmp_path / "results"), **settings))
    assert not (tmp_path / "results").exists()


def test_the_processes_measure(tmp_path):
    sizes = [
        "--rows",
        "160",
        "--features",
        "16",
        "--epochs",
        "30",
        "--rounds",
        "1",
        "--cores",
        "1",
        "--contenders",
        "ours",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [sys.executable, "benchmarks/heads.py", "--out", str(tmp_path), *sizes]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert [len(runs) for scenario in record["runs"].values() for runs in scenario.values()] == [1, 1]
    assert "- not measured: ours, 1 head on all rows, s: wanted at most 3" in path.with_suffix(".md").read_text()
