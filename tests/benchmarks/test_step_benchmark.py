"""The benchmark of a training step and that of its options."""

import itertools

import pytest
import step
import step_options
import torch
import worker
from contenders import step as contenders
from contenders.step import PROJECTION, WARM, Task, model_step, step_flops, summarise_rows, timed
from harness import RunFailed
from hypothesis import given
from hypothesis import strategies as st
from patch_set import PatchSet
from report import judge
from step import TARGETS, Config, main, model_lines, report_of, summary_of, utilisation
from step_options import attempt, settings, text_of


def _task(**changes) -> Task:
    usual = {"shards": "", "images": "", "work": "", "backbone": "test_resnet", "image_size": 32, "batch_size": 4}
    return Task(**(usual | {"device": "cpu", "bf16": False, "cores": 0, "seconds": 0.0, "steps": 3} | changes))


def test_steps_after_the_first_ones_are_timed(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock["now"])

    def batches():
        for number in itertools.count():
            clock["now"] += 50 if number < WARM else 1  # seconds to wait for a batch
            yield number

    def one_step(batch):
        clock["now"] += 100 if batch < WARM else 3

    found = timed(batches(), one_step, _task(seconds=10))
    assert found == {"img_per_s": 2, "data_wait": 0.25, "steps": 3, "seconds": 12}
    assert timed(batches(), one_step, _task(seconds=0))["steps"] == 1  # never nothing


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 100), st.floats(0, 1)), min_size=2, max_size=8))
def test_rows_are_added_up_by_time(drawn):
    rows, number = [], 0
    for steps, seconds, wait in drawn:
        number += steps
        rows.append({"step": number, "patches_per_s": 4 * steps / seconds, "data_wait": wait})
    found = summarise_rows(rows, 4)
    total = sum(seconds for _, seconds, _ in drawn[1:])
    assert found["seconds"] == pytest.approx(total)
    assert found["img_per_s"] == pytest.approx(8 * sum(steps for steps, _, _ in drawn[1:]) / total)
    assert found["data_wait"] == pytest.approx(sum(seconds * wait for _, seconds, wait in drawn[1:]) / total)


def test_the_others_read_every_patch_before_any_comes_again():
    batches = itertools.islice(contenders._loaded(list(range(8)), _task()), 6)
    epochs = [sorted(one.tolist() + other.tolist()) for one, other in zip(batches, batches, strict=True)]
    assert epochs == [list(range(8))] * 3


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


def test_targets():
    found = judge(summary_of(RUNS), TARGETS)
    assert [target["reached"] for target in found] == pytest.approx([10, 0.95, 88 / 90, 90 / 29, 95 / 40, 0.02])
    assert [target["enough"] for target in found] == [None, True, False, True, False, True]
    slow = judge(summary_of({"model": [_run(100)], "joint": [_run(94, 0.021)]}), TARGETS)
    assert [target["enough"] for target in slow] == [None, False, None, None, None, False]


def _model_record(gpu, bf16=True, compiled=True):
    """A step takes 0.5 s and 10^14 operations."""
    run = _run(100) | {"steps": 4, "seconds": 2.0, "flops_per_step": 10**14, "compiled": compiled, "gpu": gpu, "peak_gib": 12.34}
    return {"runs": {"model": [run, run | {"seconds": 4.0}, run]}, "timed": {"bf16": bf16}}


def test_the_models_share_of_the_peak():
    record = _model_record("NVIDIA H200")
    assert utilisation(record).flops == 2e14 and utilisation(record).share == pytest.approx(200 / 989)
    (line,) = model_lines(record)
    assert line.startswith("- measured: the model alone: 200 TFLOP/s, 20.2% of the 989 of the NVIDIA H200 in dense bf16 (MFU);")
    for gpu, bf16 in (("NVIDIA H200 NVL", True), ("NVIDIA H200", False), (None, True)):  # no peak is known
        record = _model_record(gpu, bf16, compiled="no: no compiler")
        assert utilisation(record).share is None
        assert ("no share of the peak (MFU)" in model_lines(record)[0]) == (gpu is not None)


def test_rounds_are_interleaved_and_a_failure_stands_in_the_table(tmp_path, monkeypatch, run_main):
    tasks = []

    def one_run(name, task, peers, work, limit):
        tasks.append((name, task.seconds, task.steps))
        if name == "ray" and len(tasks) > 5:
            raise RunFailed("exit code 1: no Ray")
        of_model = {"flops_per_step": 1, "compiled": False, "gpu": None, "peak_gib": None}
        return _run(100.0, 0.01 if name == "joint" else None) | {"seconds": 3.0, "steps": 6} | of_model

    monkeypatch.setattr(step, "one_run", one_run)
    described = {"patches": 9, "kilobytes": 1.5, "left_out": 0, "drawn": True}
    monkeypatch.setattr(step, "patch_set", lambda *_, **__: PatchSet("shards", "images", described))
    record, _, code = run_main(main, Config(work=str(tmp_path), out=str(tmp_path / "out"), seconds=21))
    assert code == 1 and record["failed"] == {"ray": "exit code 1: no Ray"}
    first = [(name, 21, 42) for name in ("loader", "model", "joint", "ray")]
    assert tasks[0] == ("model", 2, 0)  # the pilot: half a second for a step
    assert tasks[1:] == [*first, *first, *[task for task in first if task[0] != "ray"]]
    rows = report_of(record).blocks[2].rows
    assert rows[3] == ["ours, both, one Ray worker (FAILED: exit code 1: no Ray)", "100", "-", "-", "100", "0%", "-"]
    assert rows[2] == ["ours, both", "100", "100", "100", "100", "0%", "1.00%"]


@pytest.mark.parametrize(("given", "least"), [({"batch_size": 1}, 2), ({"patches": 3, "dry": True}, 4), ({"rounds": 0}, 1)])
def test_user_errors(tmp_path, given, least):
    with pytest.raises(ValueError, match=f"is out of range: give at least {least}"):
        main(Config(work=str(tmp_path), out=str(tmp_path / "results"), **given))
    assert not (tmp_path / "results").exists()


# The model alone


def test_operations_grow_with_the_batch():
    few, many = (step_flops(model_step(_task(batch_size=batch_size))) for batch_size in (4, 8))
    features = 2 * 4 * 128 * 2 * PROJECTION  # far less than the convolutions
    assert 2 * few <= many < 2 * few + 100 * features
    weights = sum(p.numel() for p in model_step(_task()).net.parameters() if p.ndim > 1)
    assert few > 3 * 2 * weights * 2 * 4  # forward, and twice that backward, of 2 x 4 views, at least once for each weight


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 2}, {"channels_last": True}, {"bf16": True}])
def test_a_step_changes_the_first_weights_and_the_last(changes):
    training = model_step(_task(**changes))
    before = {name: p.detach().clone() for name, p in training.net.named_parameters()}
    training.step()
    # Those between have none of the gradient in the first step: the norms that end a branch begin at 0.
    names = [name for name, p in training.net.named_parameters() if p.ndim > 1]
    changed = {name for name, p in training.net.named_parameters() if not p.equal(before[name])}
    assert changed >= {names[0], names[-1]}


# Its options


def test_one_thing_changes_at_a_time():
    task = _task(device="cuda", batch_size=256)
    found = [(text_of(setting), with_loader) for setting, with_loader in settings("options", task, [64])]
    assert found[0] == ("batch 256, bf16, channels last", True) and len(set(found)) == len(found) == 8
    assert not any(with_loader for text, with_loader in found if "fp32" in text)  # which the stage does not have on a GPU
    micro = [(setting.batch_size, setting.micro_batch) for setting, _ in settings("two-pass", task, [64, 1024])]
    assert micro == [(1024, None), (1024, 256), (1024, 64)]
    assert [setting.micro_batch for setting, _ in settings("two-pass", _task(), [2, 4])] == [None, 1]
    assert [setting.batch_size for setting, _ in settings("batches", _task(), [2, 4])] == [2, 4]


def test_what_fails_stands_in_the_table_and_the_next_is_tried(monkeypatch, tmp_path):
    def joint(task):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 3 GiB")

    monkeypatch.setattr(step_options, "joint", joint)
    run = attempt(_task(), tmp_path, with_loader=True)
    assert run["model"]["steps"] == 1 and run["no_memory"].startswith("joint: OutOfMemoryError: CUDA out of memory. Tried to all")
    broken = attempt(_task(backbone="resnot"), tmp_path, with_loader=True)
    assert broken["failed"].startswith("model: ValueError: backbone 'resnot'")
    timed = {"backbone": "resnot", "image_size": 32, "device": "cpu", "seconds": 1.0}
    runs = {"options": [{"text": "one"} | run, {"text": "other"} | broken], "batches": []}
    _, table = step_options.report_of({"timed": timed, "runs": runs}).blocks
    reason = f"one (no memory: {run['no_memory']})"
    assert table.rows[0][0] == reason and table.rows[0][1] != "-" and table.rows[0][3:] == ["-"] * 3
    assert table.rows[1] == [f"other (FAILED: {broken['failed']})", *["-"] * 5]
