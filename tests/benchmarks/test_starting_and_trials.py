"""The benchmark of starting and resuming, and that of trials that share a machine."""

import os
import sys

import pytest
import starting
import trials
from harness import RunFailed
from report import judge
from starting import running, seconds_until

from tests.train.finished_runs import run_of
from train.records.json_files import write_json
from tune.study.study_file import read_study


def test_a_run_that_ends_without_a_step_says_why(tmp_path):
    command = [sys.executable, "-c", "print('no patches')"]
    with running(command, tmp_path / "log") as run, pytest.raises(RunFailed, match="no step after 0: no patches"):
        seconds_until(tmp_path, 0, run, tmp_path / "log")
    with running(["sleep", "100"], tmp_path / "log") as waiting, pytest.raises(RunFailed, match="no step after 3"):
        seconds_until(tmp_path, 3, waiting, tmp_path / "log", limit=0)
    assert waiting.returncode == -9


def test_what_a_ray_worker_does_after_its_driver_has_gone_is_not_a_step_of_the_next_run(tmp_path, monkeypatch):
    path, later = tmp_path / "metrics.jsonl", iter([8, 12])
    path.write_text('{"step": 4}\n')

    def sleep(seconds):
        if step := next(later, None):
            path.write_text(path.read_text() + f'{{"step": {step}}}\n')

    monkeypatch.setattr(starting.time, "sleep", sleep)
    assert starting.last_step(tmp_path) == 12


def test_the_table_of_starts_has_medians(head):
    rounds = {"plain": [{"first": each, "again": 4.0} for each in (3.0, 9.0, 5.0)], "ray": []}
    timed = {"backbone": "b", "patches": 3, "size": 4, "batch_size": 5}
    rows = starting.report_of(head | {"runs": rounds, "timed": timed}).blocks[1].rows
    assert rows == [["without Ray", "5.0 (3.0 to 9.0)", "4.0 (4.0 to 4.0)"], ["one Ray worker", "-", "-"]]


def test_ratios_of_grids_are_of_the_same_round():
    """Medians, and ratios within a round: 12 / (20 / 2), 11 / (22 / 2), 30 / (24 / 2)."""
    times = ((20, 12), (22, 11), (24, 30))
    grids = [{"alone": alone, "seconds": grid, "between": grid - 1} for alone, grid in times]
    found = trials.summary_of({"timed": {"fit": 2}, "runs": {"grid": grids, "tiny": [{"seconds": 7}]}})
    assert found["ratio"] == pytest.approx(1.2) and found["ratio_between"] == pytest.approx(1.1)
    assert (found["alone_s"], found["grid_s"], found["between_s"], found["tiny_s"]) == (22, 12, 11, 7)
    assert [each["enough"] for each in judge({"grid": found}, trials.TARGETS)] == [False, True]


def test_spans_of_runs_that_overlap(tmp_path):
    for name, seconds, end in (("a", 10.0, 1000.0), ("b", 12.0, 1008.0)):
        run = run_of(tmp_path, name, "pretrain", {})
        write_json(run.folder / "run.json", run.record | {"wall_seconds": seconds})
        os.utime(tmp_path / name / "result.json", (end, end))
    assert trials.spans(tmp_path) == (22.0, 18.0)


def test_the_studies_have_as_many_trials_as_the_table_says(tmp_path):
    path = tmp_path / "study.yaml"
    for text, count in (
        (trials.study_text("s", tmp_path, trials=3, epochs=1), 3),
        (trials.tiny_text("s", tmp_path), trials.TINY),
    ):
        path.write_text(text)
        assert len(read_study(path).trials) == count
