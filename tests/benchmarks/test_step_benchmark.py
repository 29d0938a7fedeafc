import itertools

import pytest
import step
import torch
import worker
from contenders import step as contenders
from contenders.step import PROJECTION, WARM, Task, model_step, step_flops, summarise_rows, timed
from patch_set import PatchSet
from report import judge
from step import TARGETS, Config, attempt, main, settings, summary_of, utilisation


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


def test_rows_are_added_up_by_time():
    """The first row is left out; then 1 step in 2 s, of which half is waited, and 3 steps in 4 s without waiting."""
    rows = [{"step": 5, "patches_per_s": 0.1, "data_wait": 1.0}]
    rows += [{"step": 6, "patches_per_s": 2.0, "data_wait": 0.5}, {"step": 9, "patches_per_s": 3.0, "data_wait": 0.0}]
    found = summarise_rows(rows, 4)
    assert found == {"img_per_s": pytest.approx(2 * 4 * 4 / 6), "data_wait": pytest.approx(1 / 6), "steps": 4, "seconds": 6}


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


def test_operations_per_second_are_a_median_over_rounds():
    run = {"steps": 4, "seconds": 2.0, "flops_per_step": 10**14, "gpu": "some"}
    record = {"runs": {"model": [run, run | {"seconds": 4.0}, run]}}
    assert utilisation(record) == (2e14, "some") and utilisation({"runs": {}}) is None


def test_the_loop_takes_as_many_steps_as_the_model_takes_in_that_time(tmp_path, monkeypatch, run_main):
    tasks = []

    def one_run(name, task, peers, work):
        tasks.append((name, task.seconds, task.steps))
        of_model = {"flops_per_step": 1, "compiled": False, "gpu": None, "peak_gib": None}
        return _run(100.0, 0.01) | {"seconds": 3.0, "steps": 6} | of_model

    monkeypatch.setattr(step, "one_run", one_run)
    described = {"patches": 9, "kilobytes": 1.5, "left_out": 0, "drawn": True}
    monkeypatch.setattr(step, "patch_set", lambda *_, **__: PatchSet("shards", "images", described))
    given = {"contenders": ["model", "joint"], "seconds": 21, "rounds": 2}
    assert run_main(main, Config(work=str(tmp_path), out=str(tmp_path / "out"), **given))[2] == 0
    # The pilot has half a second for a step.
    assert tasks == [("model", 2, 0), *[("model", 21, 42), ("joint", 21, 42)] * 2]


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


# Its settings


def test_one_thing_changes_at_a_time():
    task = _task(device="cuda", batch_size=256)
    texts = [text for text, _ in settings("options", task)]
    assert texts[0] == "batch 256, bf16, channels last" and len(set(texts)) == len(texts) == 4
    assert [setting.batch_size for _, setting in settings("batches", task)] == [64, 128, 256, 512, 1024]
    micro = [(setting.batch_size, setting.micro_batch) for _, setting in settings("two-pass", task)]
    assert micro == [(1024, None), (1024, 256), (1024, 64)]


def test_what_fails_stands_in_the_table_and_the_next_is_tried(monkeypatch, tmp_path):
    def joint(task):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 3 GiB")

    monkeypatch.setattr(step, "joint", joint)
    run = attempt(_task(), tmp_path, with_loader=True)
    assert run["model"]["steps"] == 1 and run["no_memory"].startswith("OutOfMemoryError: CUDA out of memory. Tried to all")
    broken = attempt(_task(backbone="resnot"), tmp_path, with_loader=True)
    assert broken["failed"].startswith("ValueError: backbone 'resnot'")
