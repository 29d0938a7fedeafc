"""The training loop: one for every method, on one process or many, with or without Ray.

Everything random is a function of (seed, step), so the state that a run needs to go on is the weights, the optimiser's
buffers, and how many steps were taken.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.backbones import build_backbone
from models.weights import apply_init, save_backbone
from pipelines.loader import Batch, ViewLoader
from pipelines.recipes import describe_recipe
from train.records.checkpoints import CHECKPOINT_NAME, CHECKPOINTS, Background, alone_in, copied_state, keep_newest, newest_in
from train.records.data import Input
from train.records.remote_run import Mirror, on_this_node
from train.records.retry import PATIENCE, patiently
from train.records.run_lock import Upkeep
from train.records.runs import Run
from train.trainer.early_stopping import Stopping, Validation
from train.trainer.grad_cache import check_micro_batch, two_pass_backward
from train.trainer.logger import Clock, Recorder
from train.trainer.methods import Method
from train.trainer.online_probe import Probe, run_probe
from train.trainer.optim import build_optimizer, learning_rate
from train.trainer.precision import arithmetic, compile_model, on_where_it_helps
from train.trainer.profiler import tracing

# V views, B local patches, D width of the head's output, S image size

HEAD_NAME = "head.pt"
OTHERS_END = 30.0  # seconds that a worker of a driver which was killed may still live
TRIES = 12  # of what is asked of the store while a run is trained: about two minutes of pauses


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know. It travels to every worker, so it is plain data.

    compile, channels_last: None is where it helps, on a GPU. micro_batch: patches of a rank that have a graph at a time, None:
    all. profile: trace a few steps into folder/profile. validation: judge the model after every epoch, end with the best weights.
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
    validation: Validation | None = None
    url: str | None = None  # of the run, where it is at one

    @property
    def steps_per_epoch(self) -> int:
        return self.input.patches // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_epochs * self.steps_per_epoch)


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its rank, its device, and how it saves. Made by `place_in`.

    save: called by all ranks at the same step with a function that rank 0 uses to write into a folder. It may be called in a
    thread, after `save` has returned;
    wait: until the last `save` has written, for at most so many seconds (None: however long). Raises what kept it from that;
    restore: the folder of the newest checkpoint, or None, as a context;
    alone: a block in which no other process trains the run, and at the end of which all is where the run belongs;
    patience: seconds for which storage that fails is waited for.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None
    save: Callable[[int, Callable[[Path], None]], None]
    wait: Callable[[float | None], None]
    restore: Callable[[], contextlib.AbstractContextManager[Path | None]]
    alone: Callable[[], contextlib.AbstractContextManager[None]]
    patience: float = PATIENCE


class ViewModel(nn.Module):
    """All views through the backbone and the head at once: (V, B, 3, S, S) -> (V, B, D)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views_VBCSS: torch.Tensor) -> torch.Tensor:
        # One batch of V x B images: batch norm sees the views together, as in the paper.
        return self.head(self.backbone(views_VBCSS.flatten(0, 1))).unflatten(0, views_VBCSS.shape[:2])


def fit(job: Job, place: Place, tell: Callable[[dict[str, float]], None] | None = None) -> None:
    """Train to the end, from the newest checkpoint if there is one; rank 0 leaves weights, card and metrics in the folder.

    tell: given each row of metrics.jsonl too, by rank 0.
    """
    assert job.steps > 0, (job.input, job.batch_size, job.epochs)
    check_micro_batch(job.micro_batch, job.batch_size // place.world_size)
    on_gpu = place.device.type == "cuda"
    with place.alone():
        with (
            arithmetic(place.device, deterministic=job.deterministic),
            job.input.opened() as (shards, ids),
            ViewLoader(
                shards,
                ids,
                batch_size=job.batch_size,
                image_size=job.image_size,
                recipe=job.method.recipe,
                seed=job.seed,
                rank=place.rank,
                world_size=place.world_size,
                device=place.device.type,
                window=job.input.window,
                threads=job.threads or None,
                # As the model takes them on a GPU: under autocast its first layer would round them to bf16 itself.
                dtype=torch.bfloat16 if on_gpu and job.precision == "bf16" else torch.float32,
                channels_last=on_where_it_helps(job.channels_last, place.device),
            ) as loader,
        ):
            model = _train(job, place, loader, tell)
        if place.rank == 0:
            patiently(lambda: _write_weights(job, model), job.folder, seconds=place.patience)


def _train(job: Job, place: Place, loader: ViewLoader, tell: Callable[[dict[str, float]], None] | None) -> ViewModel:
    """Take the steps that are left. Returns the trained model."""
    torch.manual_seed(job.seed)
    model, init_lines = _build_model(job, place)
    optimizer = build_optimizer(job.optimizer, model, weight_decay=job.weight_decay, fused=place.device.type == "cuda")
    stopping = Stopping(job.validation) if job.validation else None
    step = _restore(place, model, optimizer, loader, stopping)

    parallel: nn.Module = model
    if place.world_size > 1:
        parallel = DistributedDataParallel(model, process_group=place.group)
    # Inductor chooses among its kernels by measuring them, so that what is to be the same every time does without.
    compiled = compile_model(parallel, False if job.deterministic and job.compile is None else job.compile, place.device)

    model.train()
    profile = job.folder / "profile" if job.profile and place.rank == 0 else None
    with contextlib.ExitStack() as stack:
        recorder = None
        if place.rank == 0:
            engine = _describe_engine(job, place, compiled)
            recorder = stack.enter_context(
                contextlib.closing(Recorder(Run(job.folder), step, init_lines, engine, tell, patience=place.patience))
            )
        stack.callback(place.wait, None)  # however the block ends, what is being written is written
        traced = stack.enter_context(tracing(profile, place.device))
        clock = Clock(loader)
        while loader.epoch < job.epochs and not (stopping and stopping.stopped):
            for batch in loader:
                rate = learning_rate(
                    step, peak=job.peak_learning_rate, steps=job.steps, warmup_steps=job.warmup_steps, schedule=job.schedule
                )
                probe = job.probe if job.probe and job.probe.due(step + 1, job.steps_per_epoch, job.steps) else None
                judged = stopping if (step + 1) % job.steps_per_epoch == 0 else None
                log = bool(probe or judged) or (step + 1) % job.log_every == 0 or step + 1 == job.steps
                values = _step(parallel, optimizer, batch, rate, step, job, place, with_metrics=log)
                step += 1
                clock.patches += job.batch_size
                if log:
                    row = {"epoch": loader.epoch, "step": step, "learning_rate": rate} | _mean_over_ranks(values, place)
                    if recorder:
                        row |= clock.read(place.device)
                        if probe:
                            row |= run_probe(probe, model.backbone, job.image_size, place.device.type, job.threads or None)
                        if judged:
                            row |= judged.look(
                                model,
                                loader.epoch,
                                image_size=job.image_size,
                                device=place.device.type,
                                threads=job.threads or None,
                            )
                        recorder.write(row)
                    clock = Clock(loader)
                if judged:
                    _agree(judged, place)
                place.wait(0)  # a disk that stays full ends the run now, not at the next checkpoint
                stopped = judged is not None and judged.stopped
                if stopped or step == job.steps or step % (job.checkpoint_every or job.steps_per_epoch) == 0:
                    place.wait(None)  # one copy of the state at a time
                    state = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "loader": loader.state_dict(),
                        "step": step,
                    }
                    if stopping:
                        state["stopping"] = stopping.state_dict()
                    place.save(step, copied_state(state, place.device) if place.rank == 0 else _nothing)
                traced()
                if stopped:
                    break
    if stopping:
        stopping.take_best(model)
    return model


def _nothing(folder: Path) -> None:
    raise AssertionError("only rank 0 writes checkpoints")


def _build_model(job, place):
    backbone = build_backbone(job.backbone, job.image_size)
    lines = apply_init(backbone, job.backbone, on_this_node(job.init))
    model = ViewModel(backbone, job.method.build_head(int(backbone.num_features)))  # type: ignore[arg-type]
    if job.precision == "fp64":
        model = model.double()
    model = model.to(place.device)
    if on_where_it_helps(job.channels_last, place.device):
        model = model.to(memory_format=torch.channels_last)
    if place.device.type == "cuda" and place.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # statistics of the global batch; torch has none for the CPU
    return model, lines


def _describe_engine(job, place, compiled):
    """How the steps are computed, as plain data for the run's record."""
    name = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "CPU"
    return {
        "device": name,
        "workers": place.world_size,
        "precision": job.precision,
        "float32_products": torch.get_float32_matmul_precision(),
        "channels_last": on_where_it_helps(job.channels_last, place.device),
        "compiled": compiled,
        "deterministic": job.deterministic,
        "micro_batch": job.micro_batch,
    }


def _step(model, optimizer, batch: Batch, rate, step, job, place, *, with_metrics):
    """One step of the optimiser, which waits for no value of the device. Returns the loss and, where asked for, metrics of this
    rank's part, still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    views = batch.views.double() if job.precision == "fp64" else batch.views
    label_B = batch.label.to(place.device, non_blocking=True)
    autocast = functools.partial(torch.autocast, place.device.type, torch.bfloat16, enabled=job.precision == "bf16")

    def reseed(micro: int) -> None:
        # For dropout and the like: a function of the step, so that a run that was cut off goes on with the same numbers.
        torch.manual_seed(job.seed * 1_000_003 + step * place.world_size + place.rank + (micro << 40))

    def loss_of(z_VBD: torch.Tensor) -> torch.Tensor:
        return job.method.loss(z_VBD, label_B, place.group)

    optimizer.zero_grad(set_to_none=True)
    if job.micro_batch and job.micro_batch < len(label_B):
        loss, z_VBD = two_pass_backward(model, views, loss_of, micro_batch=job.micro_batch, reseed=reseed, autocast=autocast)
    else:
        reseed(0)
        with autocast():
            z_VBD = model(views)
            loss = loss_of(z_VBD)
        loss.backward()
    values = {"loss": loss.detach()}
    if with_metrics:
        values |= job.method.metrics(z_VBD.detach(), label_B, place.group)
        values["gradient_norm"] = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return values


def _mean_over_ranks(values: dict[str, torch.Tensor], place: Place) -> dict[str, float]:
    stacked = torch.stack([value.double() for value in values.values()])
    if place.world_size > 1:
        dist.all_reduce(stacked, group=place.group)
        stacked /= place.world_size
    return dict(zip(values, stacked.tolist(), strict=True))


def _agree(stopping: Stopping, place: Place) -> None:
    """Rank 0 has judged the model; all end in the same step."""
    if place.world_size > 1:
        stopped = torch.tensor(float(stopping.stopped), device=place.device)
        dist.broadcast(stopped, src=0, group=place.group)
        stopping.stopped = bool(stopped)


def _restore(place: Place, model, optimizer, loader, stopping: Stopping | None) -> int:
    """Load the newest checkpoint, if any. Returns the steps taken so far."""
    with place.restore() as folder:
        if folder is None:
            return 0
        state = torch.load(folder / CHECKPOINT_NAME, map_location=place.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])
    if stopping:
        stopping.load_state_dict(state["stopping"])
    return state["step"]


def _write_weights(job: Job, model: ViewModel) -> None:
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


def place_in(
    folder: Path,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    url: str | None = None,
    others_end: float = OTHERS_END,
    patience: float = PATIENCE,
) -> Place:
    """A worker of a run in this folder, which all its workers share; or of one at a URL, whose folder on this node it is.

    Checkpoints are under folder/checkpoints, written by a thread of rank 0's, and the newest one is kept; of a run at a URL, the
    newest one there counts. Any of a run's checkpoints is as good as any other, whoever wrote it and among however many: what
    follows is the same. others_end, patience: for so many seconds another process is waited for that trains the run still, and
    storage that fails.
    """
    checkpoints, background = folder / CHECKPOINTS, Background()
    mirror = Mirror(url, tries=TRIES) if url else None
    upkeep = Upkeep(mirror) if mirror and rank == 0 else None

    def write_one(step: int, write: Callable[[Path], None]) -> None:
        written = patiently(lambda: keep_newest(checkpoints, step, write), checkpoints, seconds=patience)
        if upkeep:
            upkeep.offer(written)

    def save(step: int, write: Callable[[Path], None]) -> None:
        if rank == 0:
            background.start(functools.partial(write_one, step, write))

    def wait(seconds: float | None) -> None:
        background.wait(seconds)
        if upkeep:
            upkeep.check()

    @contextlib.contextmanager
    def restore() -> Iterator[Path | None]:
        # Rank 0 chooses: others may see a shared folder as it was a moment ago.
        chosen: list[str | None] = [None]
        if rank == 0:
            chosen = [max(mirror.checkpoints(), default=None) if mirror else newest_in(checkpoints)]
        if world_size > 1:
            dist.broadcast_object_list(chosen, src=0, group=group, device=device)
        if chosen[0] is None:
            yield None
        else:
            yield mirror.fetch_checkpoint(chosen[0]) if mirror else checkpoints / chosen[0]

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        if rank > 0:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder, others_end), upkeep or contextlib.nullcontext():
            yield

    return Place(rank, world_size, device, group, save=save, wait=wait, restore=restore, alone=alone, patience=patience)


def plain_place(folder: Path, device: torch.device | None = None, *, url: str | None = None, patience: float = PATIENCE) -> Place:
    """This process alone."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return place_in(folder, device, url=url, patience=patience)
