import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

import step_contenders  # noqa: E402
from measuring import RunFailed  # noqa: E402
from patch_set import PatchSet  # noqa: E402
from step_contenders import WARM, Task, summarise_rows, timed  # noqa: E402
from step_report import judge, markdown, model_lines, summarise, table, target_lines, utilisation  # noqa: E402

import benchmarks.step as command  # noqa: E402


def _task(**settings) -> Task:
    usual = {"shards": "", "images": "", "work": "", "backbone": "test_resnet", "image_size": 32, "batch_size": 4}
    usual |= {"device": "cpu", "bf16": False, "cores": 0, "seconds": 0.0, "steps": 3}
    return Task(**(usual | settings))


# The clock


def test_steps_after_the_first_ones_are_timed(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(step_contenders.time, "perf_counter", lambda: clock["now"])

    def batches():
        for number in itertools.count():
            clock["now"] += 50 if number < WARM else 1  # seconds to wait for a batch
            yield number

    seen = []

    def step(batch):
        clock["now"] += 100 if batch < WARM else 3
        seen.append(batch)

    found = timed(batches(), step, _task(seconds=10))
    assert found == {"img_per_s": 2, "data_wait": 0.25, "steps": 3, "seconds": 12}
    assert seen == list(range(WARM + 3))
    assert timed(batches(), step, _task(seconds=0))["steps"] == 1  # never nothing


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 100), st.floats(0, 1)), min_size=2, max_size=8))
def test_rows_are_added_up_by_time(drawn):
    rows, step = [], 0
    for steps, seconds, wait in drawn:
        step += steps
        rows.append({"step": step, "patches_per_s": 4 * steps / seconds, "data_wait": wait})
    found = summarise_rows(rows, 4)
    total = sum(seconds for _, seconds, _ in drawn[1:])
    assert found["seconds"] == pytest.approx(total)
    assert found["img_per_s"] == pytest.approx(8 * sum(steps for steps, _, _ in drawn[1:]) / total)
    assert found["data_wait"] == pytest.approx(sum(seconds * wait for _, seconds, wait in drawn[1:]) / total)


def test_the_others_read_every_patch_before_any_comes_again():
    batches = itertools.islice(step_contenders._loaded(list(range(8)), _task()), 6)
    epochs = [sorted(one.tolist() + other.tolist()) for one, other in zip(batches, batches, strict=True)]
    assert epochs == [list(range(8))] * 3


# What is made of the figures


def _run(rate, wait=None):
    return {"img_per_s": rate, "data_wait": wait}


RUNS = {
    "loader": [_run(1000), _run(2000), _run(500)],
    "model": [_run(100), _run(100), _run(50)],
    "joint": [_run(95, 0.02), _run(90, 0.03), _run(48, 0.01)],
    "ray": [_run(94, 0.02), _run(88, 0.5), _run(30, 0.01)],
    "lightly": [_run(30, 0.4), _run(29, 0.4), _run(16, 0.4)],
    "simclr": [_run(40, 0.4)],
}


def test_ratios_are_of_the_same_round():
    found = {target["text"].split(",")[0]: target for target in judge(RUNS)}
    assert found["the loader alone"]["reached"] == 10  # of 10, 20 and 10
    reached = [target["reached"] for target in judge(RUNS)]
    assert reached == pytest.approx([10, 0.95, 88 / 90, 90 / 29, 95 / 40, 0.02])
    assert [target["enough"] for target in judge(RUNS)] == [None, True, False, True, False, True]


def test_targets_are_told_one_by_one():
    record = {"targets": judge(RUNS), "missing": {"simclr": "not installed: no network"}}
    lines = target_lines(record)
    assert [line.partition(":")[0] for line in lines[:-1]] == ["measured", "reached", "MISSED", "reached", "MISSED", "reached"]
    assert lines[1] == "reached: both together, as a share of the model alone: 0.950, wanted at least 0.95"
    assert lines[5] == "reached: both together, share of the time spent waiting for data: 0.020, wanted at most 0.02"
    assert lines[6] == "Spijkervet's simclr: not installed: no network"
    words = [line.partition(":")[0] for line in target_lines({"targets": judge({"model": RUNS["model"]}), "missing": {}})]
    assert words == ["not measured"] * 6


def test_a_slow_loader_misses_both_targets():
    found = judge({"model": [_run(100)], "joint": [_run(94, 0.021)]})
    assert [target["enough"] for target in found] == [None, False, None, None, None, False]


def _model_record(gpu, bf16=True, compiled=True):
    """A step takes 0.5 s and 10^14 operations."""
    run = _run(100) | {"steps": 4, "seconds": 2.0, "flops_per_step": 10**14, "compiled": compiled, "gpu": gpu, "peak_gib": 12.34}
    return {"runs": {"model": [run, run | {"seconds": 4.0}, run]}, "timed": {"bf16": bf16}}


def test_the_models_share_of_the_peak():
    record = _model_record("NVIDIA H200")
    assert utilisation(record).flops == 2e14
    assert utilisation(record).share == pytest.approx(200 / 989)
    assert model_lines(record) == [
        "measured: the model alone: 200 TFLOP/s, 20.2% of the 989 of the NVIDIA H200 in dense bf16 (MFU); compiled;"
        " 12.3 GiB at most"
    ]


@pytest.mark.parametrize(("gpu", "bf16"), [("NVIDIA H200 NVL", True), ("NVIDIA H200", False), (None, True)])
def test_no_share_of_a_peak_that_is_not_known(gpu, bf16):
    record = _model_record(gpu, bf16, compiled="no: no compiler")
    assert utilisation(record).share is None
    (line,) = model_lines(record)
    assert ("no share of the peak (MFU)" in line) == (gpu is not None)
    assert "not compiled (no: no compiler)" in line
    assert model_lines({"runs": {}, "timed": {"bf16": bf16}}) == []


# The command


def _main(tmp_path, monkeypatch, one_run, **settings):
    """The record and the exit code of a run without processes."""
    monkeypatch.setattr(command, "one_run", one_run)
    described = {"patches": 9, "kilobytes": 1.5, "left_out": 0, "drawn": True}
    monkeypatch.setattr(command, "patch_set", lambda *_, **__: PatchSet("shards", "images", described))
    config = command.Config(work=str(tmp_path), out=str(tmp_path / "out"), **settings)
    code = 0
    try:
        command.main(config)
    except SystemExit as error:
        code = error.code
    (path,) = (tmp_path / "out").glob("*-step-cpu.json")
    record = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == markdown(record)
    return record, code


def test_rounds_are_interleaved_and_a_failure_stands_in_the_table(tmp_path, monkeypatch):
    tasks = []

    def one_run(name, task, peers, work, limit):
        tasks.append((name, task.seconds, task.steps))
        if name == "ray" and len(tasks) > 5:
            raise RunFailed("exit code 1: no Ray")
        of_model = {"flops_per_step": 1, "compiled": False, "gpu": None, "peak_gib": None}
        return _run(100.0, 0.01 if name == "joint" else None) | {"seconds": 3.0, "steps": 6} | of_model

    record, code = _main(tmp_path, monkeypatch, one_run, seconds=21)
    assert code == 1
    first = [(name, 21, 42) for name in ("loader", "model", "joint", "ray")]
    assert tasks[0] == ("model", 2, 0)  # the pilot: half a second for a step
    assert tasks[1:] == [*first, *first, *[task for task in first if task[0] != "ray"]]
    assert record["failed"] == {"ray": "exit code 1: no Ray"}
    assert record["timed"]["backbone"] == "resnet50" and record["timed"]["rounds"] == 3
    rows = table(record)[1]
    assert rows[3] == ["ours, both, one Ray worker (FAILED: exit code 1: no Ray)", "100", "-", "-", "100", "0%", "-"]
    assert rows[2] == ["ours, both", "100", "100", "100", "100", "0%", "1.00%"]
    assert summarise(record["runs"])["joint"]["data_wait"] == 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contenders": ["vissl"]}, "no contender 'vissl'"),
        ({"images": "no/such/folder"}, "no/such/folder: there is no such folder"),
        ({"rounds": 0}, "--rounds 0 is out of range"),
        ({"batch_size": 1}, "--batch-size 1 is out of range: give at least 2"),
        ({"patches": 3, "dry": True}, "--patches 3 is out of range: give at least 4"),
        ({"cores": 10_000}, "--cores 10000 is out of range"),
    ],
)
def test_slips_are_told(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        command.main(command.Config(work=str(tmp_path), out=str(tmp_path / "results"), **settings))
    assert not (tmp_path / "results").exists()


def _command(work: Path, *arguments: object) -> subprocess.CompletedProcess:
    usual = ["--work", work, "--out", work / "results", "--dry", "--seconds", 0.1, "--cores", 1]
    line = [sys.executable, "benchmarks/step.py", *map(str, [*usual, *arguments])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200, check=False)


def test_a_dry_run_measures_the_loader_and_both_together(tmp_path):
    done = _command(tmp_path, "--contenders", "joint", "loader", "--patches", 16)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").glob("*-step-cpu.json")
    record = json.loads(path.read_text())
    assert [*record["runs"]] == ["loader", "joint"]
    for (run,) in record["runs"].values():
        assert run["img_per_s"] == pytest.approx(2 * 4 * run["steps"] / run["seconds"])
    (joint,), (loader,) = record["runs"]["joint"], record["runs"]["loader"]
    assert joint["steps"] >= record["timed"]["steps"] >= 3
    assert 0 <= joint["data_wait"] <= 1 and loader["seconds"] >= 0.1
    assert not list(tmp_path.glob("run-*"))  # runs come and go
    assert "ours, both" in path.with_suffix(".md").read_text()


def test_a_backbone_that_there_is_not_is_told_in_a_sentence(tmp_path):
    done = _command(tmp_path, "--contenders", "model", "--backbone", "resnot")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("step.py: resnot at 32 px takes no step on the cpu: exit code 1: ValueError: backbone 'resnot'")
    assert done.stderr.count("\n") == 1
