"""The benchmark of starting and resuming, and that of trials that share a machine."""

import os
import sys

import pytest
import starting
import trials
from harness import RunFailed
from report import judge
from starting import running, seconds_until
from trials import TARGETS, TINY, main, spans, study_text, summary_of, tiny_text

from tests.train.finished_runs import run_of
from train.records.runs import write_json
from tune.study.study_file import read_study

FIELDS = {"backbone": "test_resnet", "image_size": 32, "batch_size": 16, "epochs": 1, "probe_every": 0}


def test_a_run_that_ends_without_a_step_says_why(tmp_path):
    command = [sys.executable, "-c", "print('no patches')"]
    with running(command, tmp_path / "log") as run, pytest.raises(RunFailed, match="no step after 0: no patches"):
        seconds_until(tmp_path, 0, run, 60, tmp_path / "log")
    with running(["sleep", "100"], tmp_path / "log") as waiting, pytest.raises(RunFailed, match="no step after 3"):
        seconds_until(tmp_path, 3, waiting, 0, tmp_path / "log")
    assert waiting.returncode == -9


def test_the_table_of_starts_has_medians(head):
    rounds = {"plain": [{"imports": 1.0, "first": each, "again": 4.0} for each in (3.0, 9.0, 5.0)], "ray": []}
    timed = {"backbone": "b", "patches": 3, "size": 4, "batch_size": 5}
    rows = starting.report_of(head | {"rounds": rounds, "timed": timed}).blocks[1].rows
    assert rows[0] == ["without Ray", "1.0 (1.0 to 1.0)", "5.0 (3.0 to 9.0)", "4.0 (4.0 to 4.0)"]
    assert rows[1] == ["one Ray worker", *["failed"] * 3]


def test_ratios_of_grids_are_of_the_same_round(head):
    """Medians, and ratios within a round: 12 / (20 / 2), 11 / (22 / 2), 30 / (24 / 2)."""
    rounds = [
        {"alone": {"summed": alone}, "grid": {"seconds": grid, "between": grid - 1}}
        for alone, grid in ((20, 12), (22, 11), (24, 30))
    ]
    timed = FIELDS | {"fit": 2, "rounds": 3, "trials": 4, "cpus": 1, "patches": 256}
    record = head | {"timed": timed, "rounds": rounds, "tiny": []}
    found = summary_of(record)
    assert found["ratio"] == pytest.approx(1.2) and found["ratio_between"] == pytest.approx(1.1)
    assert (found["alone_s"], found["grid_s"], found["between_s"]) == (22, 12, 11)
    assert [each["enough"] for each in judge({"grid": found}, TARGETS)] == [False, None]
    assert trials.report_of(record).blocks[1].rows[1][1:] == ["12.0", "1.20"]


def test_spans_of_runs_that_overlap(tmp_path):
    for name, seconds, end in (("a", 10.0, 1000.0), ("b", 12.0, 1008.0)):
        run = run_of(tmp_path, name, "pretrain", {})
        write_json(run.folder / "run.json", run.record | {"wall_seconds": seconds})
        os.utime(tmp_path / name / "result.json", (end, end))
    assert spans(tmp_path) == (22.0, 18.0)


def test_the_studies_can_be_read(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(study_text(FIELDS, "shards", tmp_path, trials=3, cpus=2, gpus=0.25))
    study = read_study(path)
    assert len(study.trials) == 3 and study.resources["pretrain"].gpus == 0.25 and study.resources["pretrain"].cpus == 2
    path.write_text(tiny_text("shards", tmp_path))
    assert len(read_study(path).trials) == TINY


def test_more_trials_than_cores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--fit 1000 is out of range"):
        main(trials.Config(work=str(tmp_path), fit=1000))
