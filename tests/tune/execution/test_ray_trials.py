"""Ray Tune: real stages in few processes; killed grids and trials, and stages that are stopped early."""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers import ROOT
from train.records.runs import Run
from tune.execution.ray_trials import _max_concurrent, with_default_gpus, with_trial_resources
from tune.execution.study_runner import run_study
from tune.reporting.table_data import build_tables
from tune.reporting.table_writers import write_tables
from tune.study.schema import Resources
from tune.study.study_file import read_study

_SECONDS = 240


@contextlib.contextmanager
def grid(study_file: Path, log: Path):
    """The script that a user runs, in the cluster of the tests."""
    import ray

    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tune" / "grid.py"), str(study_file)],
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def finished(folder: Path) -> dict[str, int]:
    """When each finished run was."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}


def _figures(path: Path) -> list[dict[str, str]]:
    """A table's rows, with figures as they are shown (sums in another order differ in the last digit)."""
    with path.open(encoding="utf-8") as file:
        return [{key: _shown(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _shown(value: str) -> str:
    try:
        return f"{float(value):.6f}"
    except ValueError:
        return value


def rows_written(folder: Path) -> int:
    return sum(len(Run(path.parent).metrics()) for path in folder.glob("*/metrics.jsonl"))


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_grid_that_is_killed_three_times_ends_as_an_undisturbed_one(ray_here, study, study_file, tmp_path):
    """By Ctrl-C, by SIGTERM and by SIGKILL. Runs the grid five times over, four of them on Ray: two and a half minutes."""
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    other = undisturbed / "small.yaml"
    other.write_text(study_file.read_text().replace(str(tmp_path / "runs"), str(undisturbed / "runs")))
    undisturbed_study = read_study(other)
    outcome = run_study(undisturbed_study, without_ray=True)
    write_tables(undisturbed_study, build_tables(undisturbed_study, outcome), undisturbed / "runs" / "report-tables")

    seed = random.randrange(10**6)
    print(f"seed {seed}")
    runs, log = tmp_path / "runs", tmp_path / "log"
    total = rows_written(undisturbed / "runs")
    before: dict[str, int] = {}
    kills = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    for rows, sent in zip(sorted(random.Random(seed).sample(range(1, total), 3)), kills, strict=True):
        said = log.stat().st_size if log.exists() else 0
        with grid(study_file, log) as process:
            ends = time.monotonic() + _SECONDS
            while rows_written(runs) < rows or log.stat().st_size == said:  # trials of a killed grid may have gone on for a while
                assert process.poll() is None and time.monotonic() < ends, log.read_text()
                time.sleep(0.02)
            os.kill(process.pid, sent)
            if sent != signal.SIGKILL:
                assert process.wait(_SECONDS) == 128 + sent, log.read_text()
                assert log.read_text().endswith("grid.py: interrupted; run the same command again to resume\n")
        now = finished(runs)
        assert {name: now[name] for name in before} == before, "a finished stage was run again"
        before = now
    with grid(study_file, log) as process:
        assert process.wait(_SECONDS) == 0, log.read_text()
    now = finished(runs)
    assert {name: now[name] for name in before} == before
    assert now.keys() == finished(undisturbed / "runs").keys() == {cell.name for cell in study.trials}
    for name in now:
        ours, theirs = Run(runs / name), Run(undisturbed / "runs" / name)
        assert ours.record["key"] == theirs.record["key"]
        assert [row["step"] for row in ours.metrics()] == [row["step"] for row in theirs.metrics()]
        if "summary" in ours.result:
            one, two = (pq.read_table(run.folder / "predictions.parquet").to_pydict() for run in (ours, theirs))
            assert one["id"] == two["id"] and one["fraction"] == two["fraction"]
            np.testing.assert_allclose(one["probabilities"], two["probabilities"], atol=1e-6)
    assert "FAILED" not in log.read_text()
    tables, theirs = (sorted((folder / "runs" / "report-tables").glob("*.csv")) for folder in (tmp_path, undisturbed))
    assert [path.name for path in tables] == [path.name for path in theirs] and tables
    for ours, other in zip(tables, theirs, strict=True):
        assert _figures(ours) == _figures(other)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_trial_whose_process_is_killed_goes_on(ray_here, study_file, tmp_path):
    """One cell of many steps; its process is found by the metrics that it has open."""
    from tests.train.cluster.test_faults import process_that_writes

    text = study_file.read_text().replace("temperature: [0.2, 0.5], seed: [1, 2]", "seed: [1], epochs: 12")
    study_file.write_text(text[: text.index("  best:")])
    study = read_study(study_file)
    (cell,) = study.trials
    metrics = tmp_path / "runs" / cell.name / "metrics.jsonl"
    killed = []

    def kill() -> None:
        ends = time.monotonic() + _SECONDS
        while time.monotonic() < ends and not (metrics.exists() and metrics.read_text().count("\n") >= 5):
            time.sleep(0.02)
        if process := process_that_writes(metrics):
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    import threading

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    outcome = run_study(study)
    killer.join(5)
    assert killed and killed[0] != os.getpid()
    assert outcome.failed == {} and outcome.ran == [cell.name]
    steps = [row["step"] for row in Run(metrics.parent).metrics()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.timeout(400)
def test_early_stopping_by_the_probe(ray_here, study_file, tmp_path, small_set, monkeypatch):
    """Of three, some are stopped at a rung and are named; the others are finished. Paths in the file are relative.

    Each trial is a process that imports torch and DALI, which takes 8 s."""
    monkeypatch.chdir(tmp_path)
    text = study_file.read_text().replace("temperature: [0.2, 0.5], seed: [1, 2]}", "temperature: [0.1, 0.2, 0.5], epochs: 3}")
    text = text.replace(str(small_set), os.path.relpath(small_set)).replace(f"{tmp_path}/", "")
    assert str(tmp_path.parent) not in text
    study_file.write_text(text[: text.index("  best:")] + "asha: {by: probe, grace_epochs: 1, reduction: 2}\n")
    outcome = run_study(read_study(study_file))
    assert len(outcome.runs) + len(outcome.failed) == 3 and outcome.runs
    assert all(why.startswith("stopped early, at probe_balanced_accuracy 0.") for why in outcome.failed.values()), outcome.failed
    for name in outcome.failed:
        assert not Run(tmp_path / "runs" / name).finished


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_trials_with_several_workers(ray_here, study_file):
    """Two Ray Train workers for a trial: the trial itself takes nothing that they need."""
    text = study_file.read_text().replace("temperature: [0.2, 0.5], seed: [1, 2]", "seed: [1, 2]")
    study_file.write_text(text[: text.index("  best:")] + "resources: {pretrain: {workers: 2, cpus: 1}}\n")
    outcome = run_study(read_study(study_file))
    assert outcome.failed == {} and len(outcome.ran) == 2
    for run in outcome.runs.values():
        assert run.result["engine"]["workers"] == 2


@pytest.mark.parametrize(
    ("needed", "room"),
    [
        ({"CPU": 1, "GPU": 0}, 16),
        ({"CPU": 1, "GPU": 0.25}, 8),
        ({"CPU": 4, "GPU": 0.25}, 4),
        ({"CPU": 2, "GPU": 2}, 1),
        ({"CPU": 3, "GPU": 0}, 5),
    ],
)
def test_as_many_trials_as_there_is_room_for(needed, room):
    assert _max_concurrent({"CPU": 16.0, "GPU": 2.0}, "pretrain", needed) == room


def test_a_trial_that_fits_nowhere_is_one_sentence():
    with pytest.raises(ValueError, match="resources of pretrain: a trial needs 4 GPUs, and the cluster has 2"):
        _max_concurrent({"CPU": 16.0, "GPU": 2.0}, "pretrain", {"CPU": 1, "GPU": 4})


def test_gpus_by_default():
    assert with_default_gpus(Resources(), {"CPU": 4.0}).gpus == 0
    assert with_default_gpus(Resources(), {"CPU": 4.0, "GPU": 2.0}).gpus == 1
    assert with_default_gpus(Resources(gpus=0.25), {"CPU": 4.0, "GPU": 2.0}).gpus == 0.25


def test_what_a_trial_may_use_is_no_part_of_the_stage(study):
    from train.stages.pretraining import stage_of
    from tune.execution.study_state import ReadyTrial

    cell = study.trials[0]
    begun = ReadyTrial(cell, cell.config)
    alone, with_workers = (
        with_trial_resources(begun, Resources(gpus=0, cpus=2)),
        with_trial_resources(begun, Resources(workers=2, gpus=0.5, cpus=3)),
    )
    assert (alone.workers, alone.threads, alone.gpus_per_worker) == (0, 1, 0)
    assert (with_workers.workers, with_workers.gpus_per_worker, with_workers.cpus_per_worker) == (2, 0.5, 3)
    assert stage_of(alone).key == stage_of(with_workers).key == stage_of(cell.config).key
