"""The training loop: one for every method, on one process or many, with or without Ray.

Everything random is a function of (seed, step). So the state that a run resumes from is the weights, the optimiser's buffers
and the number of steps taken.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.backbones import build_backbone
from models.weights import all_finite, apply_init, save_backbone
from pipelines.loader import Batch, ViewLoader
from pipelines.mixture import Mixture
from pipelines.recipes import describe_recipe
from pipelines.shard_reader import DamagedPatch, ShardReader
from train.records.checkpoints import copied_state
from train.records.data import Input
from train.records.json_files import write_json
from train.records.places import with_name_of
from train.records.runs import Run
from train.trainer.early_stopping import EarlyStopping, Validation
from train.trainer.grad_cache import check_micro_batch, grad_cache_backward
from train.trainer.logger import Clock, MetricsLogger
from train.trainer.methods import Method
from train.trainer.online_probe import Probe, run_probe
from train.trainer.optim import build_optimizer, learning_rate
from train.trainer.precision import backend_settings, compile_model, default_on_cuda, device_name
from train.trainer.profiler import tracing
from train.trainer.worker import Worker, damaged_checkpoint

# V views, B local patches, D width of the head's output, S image size

HEAD_NAME = "head.pt"
DAMAGED_NAME = "damaged.json"  # the patches that were skipped
_MOST_DAMAGED = 0.01  # of the selected patches of a set


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know. It travels to every worker, so it is plain data.

    compile, channels_last: None is on a GPU. micro_batch: patches of a rank that have a graph at a time, None: all. profile:
    trace a few steps into folder/profile. on_bad_patch: "skip" to replace damaged patches, None where that cannot be chosen.
    private: record no folders. validation: evaluate the model after every epoch, end with the best weights.
    """

    folder: Path  # of the run, which all workers share; or where it is at a URL, one on each node
    input: Input
    method: Method
    backbone: str
    init: str  # scratch, imagenet, or a path
    image_size: int
    batch_size: int
    epochs: int
    optimizer: str
    peak_learning_rate: float
    weight_decay: float
    warmup_epochs: float
    precision: str
    seed: int
    threads: int
    compile: bool | None
    log_every: int
    checkpoint_every: int
    max_failures: int
    card: dict[str, Any] = field(repr=False)
    schedule: str = "cosine"
    probe: Probe | None = None
    micro_batch: int | None = None
    channels_last: bool | None = None
    deterministic: bool = False
    profile: bool = False
    on_bad_patch: str | None = None
    private: bool = False
    validation: Validation | None = None
    url: str | None = None  # of the run, where it is at one

    @classmethod
    def from_config(cls, config: Any, **settled: Any) -> Self:
        """A stage's config as a job: fields that are not given are the config's fields of the same name."""
        names = {each.name for each in dataclasses.fields(cls)} - settled.keys()
        return cls(**settled, **{name: getattr(config, name) for name in names if hasattr(config, name)})

    @property
    def steps_per_epoch(self) -> int:
        return self.input.patches // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_epochs * self.steps_per_epoch)


class ViewModel(nn.Module):
    """All views through the backbone and the head at once: (V, B, 3, S, S) -> (V, B, D)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views_VBCSS: torch.Tensor) -> torch.Tensor:
        # One batch of V x B images: batch norm sees the views together, as in the paper.
        return self.head(self.backbone(views_VBCSS.flatten(0, 1))).unflatten(0, views_VBCSS.shape[:2])


def fit(job: Job, worker: Worker, on_row: Callable[[dict[str, float]], None] | None = None) -> None:
    """Train to the end, from the newest checkpoint if there is one. Rank 0 writes weights, card and metrics into the folder.

    on_row: called by rank 0 with each row of metrics.jsonl.
    """
    assert job.steps > 0, (job.input, job.batch_size, job.epochs)
    check_micro_batch(job.micro_batch, job.batch_size // worker.world_size)
    with worker.store.locked() if worker.is_main else contextlib.nullcontext():
        if worker.is_main:
            Run(job.folder).check_key(job.card.get("key"))
        try:
            model = _train(job, worker, on_row)
        except DamagedPatch as error:
            if job.on_bad_patch is None:
                raise
            raise ValueError(f"{error}; or resume without it: the same command with --on-bad-patch skip") from error
        if worker.is_main:
            worker.retry(lambda: _write_weights(job, model), job.folder)


def _train(job: Job, worker: Worker, on_row: Callable[[dict[str, float]], None] | None) -> ViewModel:
    """Take the remaining steps. Returns the trained model, with the best weights if there is a validation part."""
    device, threads = worker.device, job.threads or None
    with contextlib.ExitStack() as stack:
        # ---- Data ----

        stack.enter_context(backend_settings(device, deterministic=job.deterministic))
        shards, ids = stack.enter_context(job.input.opened())
        loader = stack.enter_context(
            ViewLoader(
                shards,
                ids,
                batch_size=job.batch_size,
                image_size=job.image_size,
                recipe=job.method.recipe,
                seed=job.seed,
                rank=worker.rank,
                world_size=worker.world_size,
                device=device.type,
                window=job.input.window,
                threads=threads,
                # As the model takes them on a GPU: under autocast its first layer would round them to bf16 itself.
                dtype=torch.bfloat16 if device.type == "cuda" and job.precision == "bf16" else torch.float32,
                channels_last=default_on_cuda(job.channels_last, device),
                replace_damaged=job.on_bad_patch == "skip",
            )
        )
        damaged: set[int] = set()  # patches that were replaced, on all ranks

        # ---- Model and optimiser ----

        torch.manual_seed(job.seed)
        model, init_lines = _build_model(job, worker)
        optimizer = build_optimizer(job.optimizer, model, weight_decay=job.weight_decay, fused=device.type == "cuda")
        stopping = EarlyStopping(job.validation) if job.validation else None

        # ---- Resume ----

        step, state = 0, worker.load_checkpoint()
        if state is not None:
            try:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                loader.load_state_dict(state["loader"])
                if stopping:
                    stopping.load_state_dict(state["stopping"])
                step = int(state["step"])
                damaged |= set(map(int, state.get("damaged", ())))
            except torch.OutOfMemoryError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise damaged_checkpoint(state["path"], error) from error
            del state

        # ---- Parallel and compiled ----

        parallel: nn.Module = model
        if worker.world_size > 1:
            parallel = DistributedDataParallel(model, process_group=worker.group)
        # Inductor chooses among its kernels by timing them, so a deterministic run does without.
        compiled = compile_model(parallel, False if job.deterministic and job.compile is None else job.compile, device)

        # ---- Logging ----

        logger, profile = None, None
        if worker.is_main:
            engine = _describe_engine(job, worker, compiled)
            init_lines = with_name_of(job.init, init_lines) if job.private else init_lines
            logger = MetricsLogger(
                Run(job.folder), step, init_lines, engine, on_row, retry_timeout_s=worker.store.retry_timeout_s
            )
            stack.enter_context(contextlib.closing(logger))
            profile = job.folder / "profile" if job.profile else None
        stack.callback(worker.store.wait)  # however the block ends, the checkpoint that is being written is finished
        after_step = stack.enter_context(tracing(profile, device))
        clock = Clock(loader)

        # ---- Train ----

        model.train()
        while loader.epoch < job.epochs and not (stopping and stopping.stopped):
            for batch in loader:
                rate = learning_rate(
                    step, peak=job.peak_learning_rate, steps=job.steps, warmup_steps=job.warmup_steps, schedule=job.schedule
                )
                last = step + 1 == job.steps
                probe = job.probe if job.probe and job.probe.due(step + 1, job.steps_per_epoch, job.steps) else None
                validation = stopping if (step + 1) % job.steps_per_epoch == 0 else None
                log = bool(probe or validation) or last or (step + 1) % job.log_every == 0
                save = last or (step + 1) % (job.checkpoint_every or job.steps_per_epoch) == 0
                values = _step(parallel, optimizer, batch, rate, step, job, worker, with_metrics=log)
                step += 1
                clock.patches += job.batch_size
                if job.on_bad_patch == "skip" and (log or save):
                    damaged |= worker.union(loader.damaged)
                    _check_damaged(shards, damaged, job)

                # ---- Log, probe and validate ----

                if log:
                    row = {"epoch": loader.epoch, "step": step, "learning_rate": rate} | worker.mean(values)
                    if damaged:
                        row["damaged_patches"] = len(damaged)
                    if logger:
                        row |= clock.read(device)
                        if probe:
                            try:
                                row |= run_probe(probe, model.backbone, job.image_size, device.type, threads)
                            except DamagedPatch:  # since the probe's patches were chosen
                                if job.on_bad_patch != "skip":
                                    raise
                                row["probe_damaged"] = 1
                        if validation:
                            row |= validation.evaluate(
                                model, loader.epoch, image_size=job.image_size, device=device.type, threads=threads
                            )
                        logger.write(row)
                    clock = Clock(loader)
                    if not math.isfinite(row["loss"]):  # the mean over ranks, so that all of them end here
                        raise _diverged(f"the loss is {row['loss']:g}", step)
                if validation:
                    validation.stopped = worker.broadcast(validation.stopped)  # all ranks end in the same step
                stopped = validation is not None and validation.stopped

                # ---- Save ----

                worker.store.wait(0)  # a disk that stays full ends the run now, not at the next checkpoint
                if worker.is_main and (save or stopped):
                    worker.store.wait()  # one copy of the state at a time
                    state = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "loader": loader.state_dict(),
                        "step": step,
                    }
                    if not all_finite(state["model"].values()):
                        raise _diverged("a weight is not finite", step)
                    if stopping:
                        state["stopping"] = stopping.state_dict()
                    if damaged:
                        state["damaged"] = sorted(damaged)
                    worker.store.save(step, copied_state(state, device))
                after_step()
                if stopped:
                    break
        if worker.is_main and damaged:
            names = shards.name_patches(np.array(sorted(damaged)))
            worker.retry(lambda: write_json(job.folder / DAMAGED_NAME, names), job.folder)
    if stopping:
        stopping.load_best(model)
    return model


def _build_model(job: Job, worker: Worker) -> tuple[ViewModel, list[str]]:
    """The model on its device, and lines that say what its weights come from."""
    backbone = build_backbone(job.backbone, job.image_size)
    lines = apply_init(backbone, job.backbone, job.init)
    model = ViewModel(backbone, job.method.build_head(int(backbone.num_features)))  # type: ignore[arg-type]
    if job.precision == "fp64":
        model = model.double()
    model = model.to(worker.device)
    if default_on_cuda(job.channels_last, worker.device):
        model = model.to(memory_format=torch.channels_last)
    if worker.device.type == "cuda" and worker.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # statistics of the global batch; torch has none for the CPU
    return model, lines


def _describe_engine(job: Job, worker: Worker, compiled: bool | str) -> dict[str, Any]:
    """How the steps are computed, as plain data for the run's record."""
    return {
        "device": device_name(worker.device),
        "workers": worker.world_size,
        "precision": job.precision,
        "float32_products": torch.get_float32_matmul_precision(),
        "channels_last": default_on_cuda(job.channels_last, worker.device),
        "compiled": compiled,
        "deterministic": job.deterministic,
        "micro_batch": job.micro_batch,
    }


def _step(model, optimizer, batch: Batch, rate: float, step: int, job: Job, worker: Worker, *, with_metrics: bool):
    """One step of the optimiser, which waits for no value of the device.

    Returns the loss and, with_metrics, the metrics of this rank's part, as tensors on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    views = batch.views.double() if job.precision == "fp64" else batch.views
    label_B = batch.label.to(worker.device, non_blocking=True)
    autocast = functools.partial(torch.autocast, worker.device.type, torch.bfloat16, enabled=job.precision == "bf16")

    def reseed(micro: int) -> None:
        # For dropout and the like: a function of the step, so that a resumed run draws the same numbers.
        torch.manual_seed(job.seed * 1_000_003 + step * worker.world_size + worker.rank + (micro << 40))

    def loss_of(z_VBD: torch.Tensor) -> torch.Tensor:
        return job.method.loss(z_VBD, label_B, worker.group)

    optimizer.zero_grad(set_to_none=True)
    if job.micro_batch and job.micro_batch < len(label_B):
        loss, z_VBD = grad_cache_backward(model, views, loss_of, micro_batch=job.micro_batch, reseed=reseed, autocast=autocast)
    else:
        reseed(0)
        with autocast():
            z_VBD = model(views)
            loss = loss_of(z_VBD)
        loss.backward()
    values = {"loss": loss.detach()}
    if with_metrics:
        values |= job.method.metrics(z_VBD.detach(), label_B, worker.group)
        values["gradient_norm"] = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return values


def _diverged(what: str, step: int) -> ValueError:
    return ValueError(
        f"at step {step} {what}: training has diverged, and no weights are written. Try a smaller --learning-rate or more"
        " --warmup-epochs, under another --name; the newest checkpoint before that step is kept"
    )


def _check_damaged(shards: ShardReader | Mixture, damaged: set[int], job: Job) -> None:
    """Raise ValueError if too many of a set's patches are damaged."""
    ids = np.array(sorted(damaged), np.int64)
    numbers = shards.set_numbers(ids)
    for number, each in enumerate(job.input.sets):
        if (count := int((numbers == number).sum())) > _MOST_DAMAGED * len(each.ids):
            (first,) = shards.name_patches(ids[numbers == number][:1])
            raise ValueError(
                f"{each.shards}: {count:,} of {len(each.ids):,} selected patches are damaged, more than {_MOST_DAMAGED:.0%}"
                f" ({first}, ...): copy or build the set again (sharding/inspect_shards.py --verify lists what is damaged), and"
                " the same command resumes from the newest checkpoint"
            )


def _write_weights(job: Job, model: ViewModel) -> None:
    """The head, the backbone and its model card, into the run's folder."""
    recipe = describe_recipe(job.method.recipe)
    card = job.card | {
        "backbone": job.backbone,
        "features": model.backbone.num_features,
        "image_size": job.image_size,
        "mean": recipe["mean"],
        "std": recipe["std"],
        "recipe_name": job.method.recipe_name,
        "recipe": recipe,
        "data": job.input.describe_sets(),
        "final": Run(job.folder).final,
    }
    torch.save({name: tensor.cpu() for name, tensor in model.head.state_dict().items()}, job.folder / HEAD_NAME)
    save_backbone(model.backbone, job.folder, card)
