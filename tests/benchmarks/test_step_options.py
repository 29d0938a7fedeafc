import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

import step_options  # noqa: E402
from step_contenders import Task  # noqa: E402
from step_model import METHOD, model_step, step_flops  # noqa: E402
from step_options import GROUPS, Config, Setting, attempt, body, main, settings, tables  # noqa: E402


def _task(**changes) -> Task:
    usual = {"shards": "", "images": "", "work": "", "backbone": "test_resnet", "image_size": 32, "batch_size": 4}
    return Task(**(usual | {"device": "cpu", "bf16": False, "cores": 1, "seconds": 0.0, "steps": 0} | changes))


# The model alone


def _model_step(batch_size=4, **changes):
    usual = {"backbone": "test_resnet", "image_size": 32, "device": "cpu", "precision": "fp32"}
    return model_step(**(usual | {"batch_size": batch_size} | changes))


def test_operations_grow_with_the_batch():
    few, many = (step_flops(_model_step(batch_size)) for batch_size in (4, 8))
    features = 2 * 4 * 128 * 2 * METHOD.projection_dim  # far less than the convolutions
    assert 2 * few <= many < 2 * few + 100 * features
    net = _model_step().net
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert few > 3 * 2 * weights * 2 * 4  # forward, and twice that backward, of 2 x 4 views, at least once for each weight


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 2}, {"channels_last": True}, {"precision": "bf16"}])
def test_a_step_changes_the_first_weights_and_the_last(changes):
    training = _model_step(**changes)
    before = {name: p.detach().clone() for name, p in training.net.named_parameters()}
    training.step()
    # Those between have none of the gradient in the first step: the norms that end a branch begin at 0.
    names = [name for name, p in training.net.named_parameters() if p.ndim > 1]
    changed = {name for name, p in training.net.named_parameters() if not p.equal(before[name])}
    assert changed >= {names[0], names[-1]}


def test_channels_last_is_how_weights_lie_in_memory():
    last, first = (_model_step(channels_last=choice).net for choice in (True, False))
    for name, weight in last.named_parameters():
        if weight.ndim == 4 and min(weight.shape[1:3]) > 1:
            assert weight.is_contiguous(memory_format=torch.channels_last)
            assert dict(first.named_parameters())[name].is_contiguous()


# The settings


def test_one_thing_changes_at_a_time():
    found = list(settings("options", "cuda", 256, [64]))
    assert found[0] == Setting("bf16", True, False, 256, joint=True)
    assert len(set(found)) == len(found) == 8
    assert {setting.precision for setting in found} == {"bf16", "tf32", "fp32"}
    assert not any(setting.joint for setting in found if setting.precision == "fp32")  # which the stage does not have on a GPU
    assert {setting.compile for setting in settings("options", "cpu", 4, [4])} == {True, False}


def test_the_largest_batch_is_cut_into_micro_batches():
    found = [(setting.batch_size, setting.micro_batch) for setting in settings("two-pass", "cuda", 256, [64, 1024])]
    assert found == [(1024, None), (1024, 256), (1024, 64)]
    assert [setting.micro_batch for setting in settings("two-pass", "cpu", 4, [2, 4])] == [None, 1]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_float32_is_float32_only_where_it_is_asked_for(precision):
    torch.set_float32_matmul_precision("high")
    try:
        with step_options.float32(precision):
            ieee = precision == "fp32"
            assert torch.get_float32_matmul_precision() == ("highest" if ieee else "high")
            assert torch.backends.cudnn.conv.fp32_precision == ("ieee" if ieee else "tf32")
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_fails_stands_in_the_table_and_the_next_is_tried(monkeypatch, tmp_path):
    def joint(setting, task, work, found):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 3 GiB")

    monkeypatch.setattr(step_options, "with_loader", joint)
    run = attempt(Setting("fp32", True, False, 4, joint=True), _task(), tmp_path)
    assert run["model"]["steps"] == 1 and run["model"]["img_per_s"] > 0
    assert run["no_memory"] == "joint: OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"
    broken = attempt(Setting("fp32", True, False, 4, joint=True), _task(backbone="resnot"), tmp_path)
    assert broken["failed"].startswith("model: ValueError: backbone 'resnot'")
    timed = {"backbone": "resnot", "image_size": 32, "device": "cpu", "seconds": 1.0}
    runs = {"options": [{"text": "one"} | run, {"text": "other"} | broken], "batches": []}
    ((_, _, rows),) = tables({"timed": timed, "runs": runs})
    assert rows[0][0] == f"one (no memory: {run['no_memory']})" and rows[0][1] != "-" and rows[0][3:] == ["-"] * 3
    assert rows[1] == [f"other (FAILED: {broken['failed']})", *["-"] * 5]
    assert len(body({"timed": timed, "runs": runs})) == 7


# The command


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"groups": ["compile"]}, "no contender 'compile'"),
        ({"batches": [1]}, "give at least 2"),
        ({"batch_size": 1}, "at least 2"),
    ],
)
def test_slips_are_told(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        main(Config(work=str(tmp_path), out=str(tmp_path / "results"), dry=True, **given))
    assert not (tmp_path / "results").exists()


def test_a_dry_run_measures_every_group(tmp_path):
    arguments = ["--work", tmp_path, "--out", tmp_path / "results", "--dry", "--no-compile", "--patches", 16, "--batches", 2, 4]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "benchmarks/step_options.py", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").glob("*-step-options-cpu.json")
    record = json.loads(path.read_text())
    assert [*record["runs"]] == list(GROUPS)
    assert [len(runs) for runs in record["runs"].values()] == [2, 2, 2]
    for run in (run for runs in record["runs"].values() for run in runs):
        batch_size = run["setting"]["batch_size"]
        for measured in (run["model"], *([run["joint"]] if run["setting"]["joint"] else [])):
            assert measured["img_per_s"] == pytest.approx(2 * batch_size * measured["steps"] / measured["seconds"])
    assert not list(tmp_path.glob("run-*"))  # runs come and go
    assert "batch 4 in micro-batches of 1, fp32, channels last" in path.with_suffix(".md").read_text()
