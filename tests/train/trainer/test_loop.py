"""The training loop in this process: it learns, and a run that was cut off ends as if it had not been."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import math
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models.backbones import build_backbone
from models.weights import WEIGHTS_NAME, load_backbone_weights
from pipelines.loader import Batch, ViewLoader
from pipelines.recipes import RandomCrop, Recipe
from sharding.manifest import fingerprint
from sharding.packing import build_shards
from tests.helpers import open_files
from train.records import retry
from train.records.checkpoints import CheckpointStore
from train.records.data import Input, SetInput
from train.records.remote_run import CHECKPOINT_NAME
from train.records.runs import Run
from train.trainer import loop
from train.trainer.logger import MetricsLogger
from train.trainer.loop import HEAD_NAME, Job, ViewModel, fit
from train.trainer.methods import SimCLR, Supervised
from train.trainer.optim import build_optimizer
from train.trainer.worker import Worker, single_worker

CPU = torch.device("cpu")


class CutOff(Exception):
    """What ends a run before its time."""


@pytest.fixture(autouse=True)
def _reference_views(monkeypatch):
    """The same views by torchvision: DALI's graph with colours takes seconds to compile, for every one of the runs here."""
    monkeypatch.setattr(loop, "ViewLoader", functools.partial(ViewLoader, backend="torchvision"))


def input_of(data, ids):
    return Input((SetInput(str(data), fingerprint(data), ids),))


def job_of(folder, data, **changes) -> Job:
    """20 patches, 5 steps of 4 in an epoch, 2 epochs; no batch norm."""
    job = Job(
        folder=folder,
        input=input_of(data, np.arange(20)),
        method=SimCLR(projection_dim=8, temperature=0.5),
        backbone="test_efficientnet_ln",
        init="scratch",
        image_size=32,
        batch_size=4,
        epochs=2,
        optimizer="adam",
        peak_learning_rate=1e-3,
        weight_decay=1e-4,
        warmup_epochs=0.2,
        precision="fp32",
        seed=3,
        threads=1,
        compile=False,
        log_every=1,
        checkpoint_every=2,
        max_failures=0,
        card={"method": "simclr", "chain": ["simclr on small"], "key": "k"},
    )
    folder.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(job, **changes)


def with_save(worker, save):
    """The worker, saving by this function of the store's own `save`, the step and what writes."""
    worker.store.save = functools.partial(save, worker.store.save)
    return worker


def cut_after(worker, step):
    """The worker, ending the run right after the checkpoint of that step."""

    def save(real, at, write):
        real(at, write)
        if at == step:
            raise CutOff

    return with_save(worker, save)


def cut_before_saving(worker, step):
    """The worker, ending the run at that step's checkpoint before it is written: rows of metrics.jsonl are ahead of it."""

    def save(real, at, write):
        if at == step:
            raise CutOff
        real(at, write)

    return with_save(worker, save)


def rows_of(folder):
    return [(row["epoch"], row["step"], row["loss"], row["learning_rate"], row["top1"]) for row in Run(folder).metrics()]


def weights_of(folder):
    return load_file(folder / "backbone.safetensors") | torch.load(folder / HEAD_NAME, weights_only=True)


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# Learning


@dataclasses.dataclass(frozen=True)
class MildSimCLR(SimCLR):
    """Views that leave a patch's colours as they are, so that a few steps can learn to tell patches apart."""

    @property
    def recipe(self):
        return Recipe(views=2, crop=RandomCrop(area=(0.7, 1.0)), flip=0.5)


def test_learns_to_tell_patches_apart(tmp_path, monkeypatch):
    """Eight patches, each of a colour of its own: far below ln(2N - 1), the loss of a model that knows nothing."""
    monkeypatch.setattr(loop, "ViewLoader", ViewLoader)
    for k, colour in enumerate(itertools.product((30, 220), repeat=3)):
        path = tmp_path / "images" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(path)
    build_shards([tmp_path / "images"], tmp_path / "shards", unlabelled=True)
    job = job_of(
        tmp_path / "run",
        tmp_path / "shards",
        input=input_of(tmp_path / "shards", np.arange(8)),
        method=MildSimCLR(8, 0.5),
        batch_size=8,
        epochs=40,
    )
    job = dataclasses.replace(job, log_every=40, checkpoint_every=1000, peak_learning_rate=2e-3)
    fit(job, single_worker(job.folder, CPU))
    (row,) = Run(job.folder).metrics()
    assert row["loss"] < 0.6 * math.log(2 * 8 - 1)
    assert row["top1"] > 0.9


def test_what_a_run_leaves(tmp_path, small_set):
    job = job_of(tmp_path / "run", small_set)
    fit(job, single_worker(job.folder, CPU))
    rows = Run(job.folder).metrics()
    assert [(row["epoch"], row["step"]) for row in rows] == [(k // 5, k + 1) for k in range(10)]
    assert all(row["loss"] > 0 and 0 <= row["top1"] <= 1 and row["patches_per_s"] > 0 for row in rows)
    assert all(0 <= row["data_wait"] <= 1 for row in rows)
    assert all(row["images_per_s"] == pytest.approx(2 * row["patches_per_s"], abs=0.03) for row in rows)
    assert all(0 <= row["alignment"] <= 4 and row["uniformity"] < 0 and row["gradient_norm"] > 0 for row in rows)
    assert all(0 < row["embedding_std"] <= 1 for row in rows)
    assert rows[0]["learning_rate"] == 1e-3 > rows[1]["learning_rate"] * 0.999  # one step of warm-up, then down
    assert rows[-1]["learning_rate"] < 1e-4
    card = json.loads((job.folder / "model_card.json").read_text())
    assert (card["backbone"], card["image_size"], card["chain"]) == ("test_efficientnet_ln", 32, ["simclr on small"])
    assert card["recipe"]["views"] == 2 and card["mean"] == [0.485, 0.456, 0.406]
    backbone = build_backbone(job.backbone, 32)
    assert card["features"] == backbone.num_features
    load_backbone_weights(backbone, job.folder)  # raises where anything is missing
    assert [path.name for path in (job.folder / "checkpoints").iterdir()] == ["step-000000010"]
    assert list((job.folder / "tensorboard").iterdir())
    assert json.loads((job.folder / "init.json").read_text()) == ["test_efficientnet_ln: random weights"]


def test_weights_start_from_init(tmp_path, small_set):
    """With a learning rate of next to nothing, what comes out is what went in."""
    first = job_of(tmp_path / "first", small_set, epochs=1)
    fit(first, single_worker(first.folder, CPU))
    second = job_of(tmp_path / "second", small_set, epochs=1, init=str(first.folder), peak_learning_rate=1e-30, seed=99)
    fit(second, single_worker(second.folder, CPU))
    assert_same_weights(*(load_file(job.folder / "backbone.safetensors") for job in (first, second)))
    assert "tensors loaded" in (second.folder / "init.json").read_text()


def test_seed_decides_everything(tmp_path, small_set):
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        job = job_of(tmp_path / name, small_set, epochs=1, seed=seed)
        torch.manual_seed(len(weights))  # what ran before does not matter
        fit(job, single_worker(job.folder, CPU))
        weights.append(weights_of(job.folder))
    assert_same_weights(weights[0], weights[1])
    kernels = [name for name, tensor in weights[0].items() if tensor.ndim == 4]
    assert kernels
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in kernels)


@pytest.mark.parametrize("method", [SimCLR(projection_dim=8, temperature=0.5), Supervised(classes=3)])
def test_micro_batches_give_the_same_run(tmp_path, small_set, method):
    """In double precision and without batch norm: the same losses and weights, but for rounding."""
    found = []
    for micro_batch in (None, 1, 2, 4):
        ids = np.arange(0, 90, 6)[:12]
        job = job_of(tmp_path / str(micro_batch), small_set, input=input_of(small_set, ids), method=method)
        job = dataclasses.replace(job, precision="fp64", micro_batch=micro_batch, peak_learning_rate=0.1, optimizer="sgd")
        fit(job, single_worker(job.folder, CPU))
        found.append((weights_of(job.folder), [row["loss"] for row in Run(job.folder).metrics()]))
    weights, losses = found[0]
    assert len(set(losses)) == 6  # something was learnt
    assert found[3][1] == losses  # one micro-batch is no micro-batching
    for other, other_losses in found[1:]:
        assert other_losses == pytest.approx(losses, rel=1e-10)
        for name in weights:
            torch.testing.assert_close(other[name], weights[name], rtol=1e-6, atol=1e-9)  # the backbone's are kept in float32


def test_a_micro_batch_that_does_not_divide_is_refused(tmp_path, small_set):
    job = job_of(tmp_path / "run", small_set, micro_batch=3)
    with pytest.raises(ValueError, match="--micro-batch 3 must divide the 4 patches"):
        fit(job, single_worker(job.folder, CPU))


@pytest.mark.parametrize("changes", [{"deterministic": True}, {"channels_last": True}])
def test_ways_to_compute_give_the_same_on_a_cpu(tmp_path, small_set, changes):
    found = []
    for name, settings in (("plain", {}), ("other", changes)):
        job = job_of(tmp_path / name, small_set, epochs=1, precision="fp64", **settings)
        fit(job, single_worker(job.folder, CPU))
        found.append([row["loss"] for row in Run(job.folder).metrics()])
        engine = json.loads((job.folder / "engine.json").read_text())
        assert engine | settings == engine
        assert (engine["device"], engine["precision"], engine["compiled"]) == ("CPU", "fp64", False)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("with_metrics", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("optimizer", ["lars", "adam", "sgd"])
def test_a_step_waits_for_no_value_of_the_device(tmp_path, small_set, optimizer, micro_batch, with_metrics):
    """On tensors that have no values to wait for: asking for one raises."""
    job = job_of(tmp_path, small_set, micro_batch=micro_batch)
    worker = single_worker(tmp_path, CPU)
    with FakeTensorMode():
        backbone = build_backbone(job.backbone, 32)
        model = ViewModel(backbone, job.method.build_head(backbone.num_features))
        fused = build_optimizer(optimizer, model, weight_decay=0.1, fused=True)  # as on a GPU
        batch = Batch(torch.randn(2, 4, 3, 32, 32), torch.arange(4), torch.zeros(4, dtype=torch.int64))
        values = loop._step(model, fused, batch, 0.1, 5, job, worker, with_metrics=with_metrics)
        with pytest.raises(DataDependentOutputException):
            values["loss"].item()
    assert values.keys() >= ({"loss", "top1", "alignment", "embedding_std", "gradient_norm"} if with_metrics else {"loss"})
    assert with_metrics or values.keys() == {"loss"}


def test_the_gradient_s_norm_is_that_of_the_whole_gradient(tmp_path, small_set):
    job, worker = job_of(tmp_path, small_set), single_worker(tmp_path, CPU)
    model, _ = loop._build_model(job, worker)
    sgd = build_optimizer("sgd", model, weight_decay=0.5, fused=False)
    batch = Batch(torch.randn(2, 4, 3, 32, 32), torch.arange(4), torch.zeros(4, dtype=torch.int64))
    values = loop._step(model, sgd, batch, 0.1, 5, job, worker, with_metrics=True)
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert values["gradient_norm"].item() == pytest.approx(whole.norm().item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precisions_agree_about_the_loss(tmp_path, small_set, precision):
    losses = []
    for name in ("fp32", precision):
        job = job_of(tmp_path / name, small_set, epochs=1, precision=name, input=input_of(small_set, np.arange(4)))
        fit(job, single_worker(job.folder, CPU))
        losses.append(Run(job.folder).metrics()[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02 if precision == "bf16" else 1e-5)
    assert losses[0] != losses[1]


def test_labels_are_learnt(tmp_path, small_set, monkeypatch):
    """The supervised method on DALI's views: patches of noise are learnt by heart, with their own labels."""
    monkeypatch.setattr(loop, "ViewLoader", ViewLoader)
    ids = np.arange(0, 90, 6)
    job = job_of(
        tmp_path / "run",
        small_set,
        input=input_of(small_set, ids),
        batch_size=15,
        epochs=60,
        method=Supervised(classes=3),
        peak_learning_rate=3e-3,
    )
    job = dataclasses.replace(job, log_every=60, checkpoint_every=1000)
    fit(job, single_worker(job.folder, CPU))
    assert Run(job.folder).metrics()[-1]["train_accuracy"] > 0.8


# Checkpoints in the background


def writing_late(worker, at, go):
    """The worker, writing the checkpoint of that step only once `go` is set."""

    def save(real, step, write):
        def late(folder):
            assert go.wait(60)
            write(folder)

        real(step, late if step == at else write)

    return with_save(worker, save)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, small_set, monkeypatch):
    """The checkpoint of step 2 is written after step 3 was taken, and the run goes on from it as from any other."""
    plain = job_of(tmp_path / "undisturbed", small_set)
    fit(plain, single_worker(plain.folder, CPU))
    job, go = job_of(tmp_path / "run", small_set, checkpoint_every=2), threading.Event()
    write = MetricsLogger.write

    def watched(self, row):
        write(self, row)
        if row["step"] == 3:
            go.set()
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "write", watched)
        with pytest.raises(CutOff):
            fit(job, writing_late(single_worker(job.folder, CPU), 2, go))
    assert [path.name for path in (job.folder / "checkpoints").iterdir()] == ["step-000000002"]
    fit(job, single_worker(job.folder, CPU))
    assert_same_weights(weights_of(job.folder), weights_of(plain.folder))
    assert rows_of(job.folder) == rows_of(plain.folder)


def failing(worker: Worker, failures: int, wait_of_steps: float = 20) -> Worker:
    """Checkpoints find the disk full so many times. The step after one is sure to see how it ended."""
    left, wait = [failures], worker.store.wait

    def save(real, step, write):
        def write_or_fail(folder):
            if left[0]:
                left[0] -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            write(folder)

        real(step, write_or_fail)

    worker.store.wait = lambda seconds=None: wait(wait_of_steps if seconds == 0 else seconds)
    return with_save(worker, save)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, small_set):
    """Also when no other checkpoint is due for long: every step looks for it."""
    job = job_of(tmp_path / "run", small_set, epochs=40, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"run/checkpoints: cannot be written \(No space left on device\)"):
        fit(job, failing(single_worker(job.folder, CPU, retry_timeout_s=0), 10**6))
    assert len(rows_of(job.folder)) == 3
    assert not (job.folder / "backbone.safetensors").exists()


def test_the_last_checkpoint_s_error_ends_the_run_too(tmp_path, small_set):
    job = job_of(tmp_path / "run", small_set, epochs=1, checkpoint_every=5)
    with pytest.raises(ValueError, match="No space left on device"):
        fit(job, failing(single_worker(job.folder, CPU, retry_timeout_s=0), 10**6, wait_of_steps=0))
    assert len(rows_of(job.folder)) == 5
    assert not (job.folder / "backbone.safetensors").exists()


def test_a_disk_that_is_full_for_a_moment_is_waited_for(tmp_path, small_set, monkeypatch, capfd):
    monkeypatch.setattr(retry, "_PAUSE_S", 0.01)
    job = job_of(tmp_path / "run", small_set, checkpoint_every=2)
    fit(job, failing(single_worker(job.folder, CPU), 3))
    assert (job.folder / "backbone.safetensors").exists()
    assert capfd.readouterr().out.count("run/checkpoints: cannot be written (No space left on device); retrying") == 1


# Going on


@pytest.mark.parametrize(
    ("backbone", "micro_batch"), [("test_efficientnet_ln", None), ("test_efficientnet", None), ("test_efficientnet", 2)]
)
def test_cut_off_run_ends_as_an_undisturbed_one(tmp_path, small_set, backbone, micro_batch):
    """Cut in mid-epoch, at an epoch's end, and between metrics and their checkpoint. The second backbone has batch norm."""
    plain = job_of(tmp_path / "undisturbed", small_set, backbone=backbone, micro_batch=micro_batch)
    fit(plain, single_worker(plain.folder, CPU))
    wanted, rows = weights_of(plain.folder), rows_of(plain.folder)
    assert len(rows) == 10

    def check(name, cuts, **changes):
        job = job_of(tmp_path / name, small_set, backbone=backbone, micro_batch=micro_batch, **changes)
        for cut in cuts:
            with pytest.raises(CutOff):
                fit(job, cut(single_worker(job.folder, CPU)))
            assert not (job.folder / "backbone.safetensors").exists()
        fit(job, single_worker(job.folder, CPU))
        assert_same_weights(weights_of(job.folder), wanted)
        assert rows_of(job.folder) == rows

    check("mid-epoch", [lambda worker: cut_after(worker, 2)])
    check("epoch's end", [lambda worker: cut_after(worker, 5)], checkpoint_every=0)
    check("thrice", [lambda worker: cut_before_saving(worker, 4), lambda worker: cut_before_saving(worker, 6),
                     lambda worker: cut_after(worker, 10)])  # fmt: skip


def test_cut_off_mixture_in_windows_ends_as_an_undisturbed_one(tmp_path, small_set, other_set):
    """The second set, of 24 patches, is gone through one and a half times, so each epoch begins it elsewhere."""
    sets = (SetInput(str(small_set), fingerprint(small_set), np.arange(20)),
            SetInput(str(other_set), fingerprint(other_set), np.arange(24), weight=4.5))  # fmt: skip
    weights = []
    for name, at in (("undisturbed", None), ("cut", 13)):
        job = job_of(tmp_path / name, small_set, input=Input(sets, window=1), checkpoint_every=1)
        assert (job.input.patches, job.steps) == (44, 22)
        if at:
            with pytest.raises(CutOff):
                fit(job, cut_after(single_worker(job.folder, CPU), at))
        fit(job, single_worker(job.folder, CPU))
        weights.append((weights_of(job.folder), rows_of(job.folder)))
    assert_same_weights(weights[0][0], weights[1][0])
    assert weights[0][1] == weights[1][1] and len(weights[0][1]) == 22


@pytest.mark.parametrize("ends", ["well", "early"])
def test_nothing_stays_open(tmp_path, small_set, monkeypatch, ends):
    closed = []

    class Watched(ViewLoader):
        def close(self):
            closed.append(self.wait_seconds)
            super().close()

    monkeypatch.setattr(loop, "ViewLoader", functools.partial(Watched, backend="torchvision"))
    shutil.copytree(small_set, tmp_path / "shards")
    threads = set(threading.enumerate())
    job = job_of(tmp_path / "run", tmp_path / "shards", epochs=1)
    opened = []

    def save(real, at, write):
        opened.append(open_files(tmp_path))
        assert threads < set(threading.enumerate())  # TensorBoard's
        if ends == "early":
            raise CutOff

    with contextlib.suppress(CutOff):
        fit(job, with_save(single_worker(job.folder, CPU), save))
    assert len(opened) == (1 if ends == "early" else 3)
    assert {"shard-000000.tar", "metrics.jsonl"} <= opened[0]
    assert not open_files(tmp_path)
    assert set(threading.enumerate()) == threads
    assert len(closed) == 1


def test_cut_off_before_the_first_checkpoint_starts_over(tmp_path, small_set):
    job = job_of(tmp_path / "run", small_set, epochs=1)
    with pytest.raises(CutOff):
        fit(job, cut_before_saving(single_worker(job.folder, CPU), 2))
    assert len(rows_of(job.folder)) == 2
    fit(job, single_worker(job.folder, CPU))
    assert [row[1] for row in rows_of(job.folder)] == [1, 2, 3, 4, 5]


def test_half_a_row_of_metrics_is_taken_away(tmp_path, small_set):
    job = job_of(tmp_path / "run", small_set, epochs=1)
    with pytest.raises(CutOff):
        fit(job, cut_after(single_worker(job.folder, CPU), 2))
    with open(job.folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 0, "step": 3, "lo')
    fit(job, single_worker(job.folder, CPU))
    assert [row[1] for row in rows_of(job.folder)] == [1, 2, 3, 4, 5]


def test_half_written_checkpoint_is_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)

    def write_half(folder):
        (folder / CHECKPOINT_NAME).write_text("half")
        raise CutOff

    assert store.newest() is None
    store.save(1, write_half)
    with pytest.raises(CutOff):
        store.wait()
    assert not list((tmp_path / "checkpoints").iterdir()) and store.newest() is None
    for step in (2, 10, 9_999):
        store.save(step, lambda folder, step=step: (folder / CHECKPOINT_NAME).write_text(str(step)))
        store.wait()
        assert (store.fetch(store.newest()) / CHECKPOINT_NAME).read_text() == str(step)
    store.save(9_999, lambda folder: (folder / CHECKPOINT_NAME).write_text("again"))
    store.wait()
    assert (store.fetch(store.newest()) / CHECKPOINT_NAME).read_text() == "again"
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1


def test_diverged_run_ends_and_keeps_its_finite_checkpoint(tmp_path, small_set):
    """A loss that is not finite ends it, with a row that JSON can hold; the weights before it are those that it goes on from."""
    job = job_of(tmp_path / "run", small_set, epochs=4)
    with pytest.raises(CutOff):
        fit(job, cut_after(single_worker(job.folder, CPU), 4))
    kept = CheckpointStore(job.folder).newest()
    job = dataclasses.replace(job, peak_learning_rate=1e30)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"at step \d+ the loss is (nan|inf): training has diverged.* smaller --learning-rate"
        ):
            fit(job, single_worker(job.folder, CPU))
        assert CheckpointStore(job.folder).newest() == kept and not (job.folder / WEIGHTS_NAME).exists()
    text = (job.folder / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert Run(job.folder).metrics()[-1]["loss"] is None


def test_weights_that_are_not_finite_are_never_saved(tmp_path, small_set):
    """The loss of a step is that of the weights before it, so the last one says nothing of the weights that are handed over."""
    job = job_of(tmp_path / "run", small_set, epochs=1, batch_size=20, optimizer="sgd", warmup_epochs=0)
    job = dataclasses.replace(job, peak_learning_rate=1e38, weight_decay=1e30)
    assert job.steps == 1
    with pytest.raises(ValueError, match="at step 1 a weight is not finite: training has diverged"):
        fit(job, single_worker(job.folder, CPU))
    assert CheckpointStore(job.folder).newest() is None and not (job.folder / WEIGHTS_NAME).exists()
