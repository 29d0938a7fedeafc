"""The training loop: one for every method, on one process or many, with or without Ray.

Everything random is a function of (seed, step), so the state that a run needs to go on is the weights, the optimiser's
buffers, and how many steps were taken.
"""

import contextlib
import json
import shutil
import time
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
from train.inputs import Input
from train.methods import Method
from train.runs import write_json, write_text
from train.schedules import build_optimizer, learning_rate

# V views, B local patches, D width of the head's output, S image size

CHECKPOINT_NAME = "checkpoint.pt"
HEAD_NAME = "head.pt"


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know. It travels to every worker, so it is plain data."""

    folder: Path  # of the run, which all workers share
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
    compile: bool
    log_every: int
    checkpoint_every: int
    max_failures: int
    card: dict[str, Any] = field(repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return self.input.patches // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its rank, its device, and how it saves. Ray's is made in `workers`, a plain one here.

    save: called by all ranks at the same step with a function that rank 0 uses to write into a folder;
    restore: the folder of the newest checkpoint, or None, as a context.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None
    save: Callable[[int, Callable[[Path], None]], None]
    restore: Callable[[], contextlib.AbstractContextManager[Path | None]]


class ViewModel(nn.Module):
    """All views through the backbone and the head at once: (V, B, 3, S, S) -> (V, B, D)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views_VBCSS: torch.Tensor) -> torch.Tensor:
        # One batch of V x B images: batch norm sees the views together, as in the paper.
        return self.head(self.backbone(views_VBCSS.flatten(0, 1))).unflatten(0, views_VBCSS.shape[:2])


def fit(job: Job, place: Place) -> None:
    """Train to the end, from the newest checkpoint if there is one; rank 0 leaves weights, card and metrics in the folder."""
    assert job.steps > 0, (job.input, job.batch_size, job.epochs)
    on_gpu = place.device.type == "cuda"
    with (
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
            channels_last=on_gpu,
        ) as loader,
    ):
        model = _train(job, place, loader)
    if place.rank == 0:
        _write_weights(job, model)


def _train(job: Job, place: Place, loader: ViewLoader) -> ViewModel:
    """Take the steps that are left. Returns the trained model."""
    torch.manual_seed(job.seed)
    model, init_lines = _build_model(job, place)
    optimizer = build_optimizer(job.optimizer, model, weight_decay=job.weight_decay, fused=place.device.type == "cuda")
    step = _restore(place, model, optimizer, loader)

    parallel: nn.Module = model
    if place.world_size > 1:
        parallel = DistributedDataParallel(model, process_group=place.group)
    if job.compile:
        parallel.compile()

    model.train()
    recorder = Recorder(job, step, init_lines) if place.rank == 0 else None
    with contextlib.closing(recorder) if recorder else contextlib.nullcontext():
        clock = Clock(loader)
        while loader.epoch < job.epochs:
            for batch in loader:
                warmup_steps = round(job.warmup_epochs * job.steps_per_epoch)
                rate = learning_rate(step, peak=job.peak_learning_rate, steps=job.steps, warmup_steps=warmup_steps)
                log = (step + 1) % job.log_every == 0 or step + 1 == job.steps
                loss, metrics = _step(parallel, optimizer, batch, rate, step, job, place, with_metrics=log)
                step += 1
                clock.patches += job.batch_size
                if log:
                    values = _mean_over_ranks({"loss": loss} | metrics, place)
                    if recorder:
                        recorder.write({"epoch": loader.epoch, "step": step, "learning_rate": rate} | values | clock.read(place))
                    clock = Clock(loader)
                if step == job.steps or step % (job.checkpoint_every or job.steps_per_epoch) == 0:
                    place.save(step, lambda folder: _write_checkpoint(folder, model, optimizer, loader, step))  # noqa: B023
    return model


def _build_model(job, place):
    backbone = build_backbone(job.backbone, job.image_size)
    lines = apply_init(backbone, job.backbone, job.init)
    model = ViewModel(backbone, job.method.build_head(int(backbone.num_features)))  # type: ignore[arg-type]
    if job.precision == "fp64":
        model = model.double()
    model = model.to(place.device)
    if place.device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        if place.world_size > 1:  # statistics of the global batch; torch has no such norm for the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, lines


def _step(model, optimizer, batch: Batch, rate, step, job, place, *, with_metrics):
    """One step of the optimiser. Returns the loss and metrics of this rank's part, still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    # For dropout and the like: a function of the step, so that a run that was cut off goes on with the same numbers.
    torch.manual_seed(job.seed * 1_000_003 + step * place.world_size + place.rank)
    views = batch.views.double() if job.precision == "fp64" else batch.views
    label_B = batch.label.to(place.device, non_blocking=True)
    with torch.autocast(place.device.type, torch.bfloat16, enabled=job.precision == "bf16"):
        z_VBD = model(views)
        loss = job.method.loss(z_VBD, label_B, place.group)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    metrics = job.method.metrics(z_VBD.detach(), label_B, place.group) if with_metrics else {}
    return loss.detach(), metrics


def _mean_over_ranks(values: dict[str, torch.Tensor], place: Place) -> dict[str, float]:
    stacked = torch.stack([value.double() for value in values.values()])
    if place.world_size > 1:
        dist.all_reduce(stacked, group=place.group)
        stacked /= place.world_size
    return dict(zip(values, stacked.tolist(), strict=True))


class Clock:
    """Speed since it was made: patches per second over all workers, and the share of time spent waiting for data."""

    def __init__(self, loader: ViewLoader):
        self._loader, self._waited, self._started = loader, loader.wait_seconds, time.perf_counter()
        self.patches = 0

    def read(self, place: Place) -> dict[str, float]:
        """patches_per_s; data_wait, 0 to 1; gpu_memory_gib, the peak so far, where there is a GPU."""
        seconds = time.perf_counter() - self._started
        wait = (self._loader.wait_seconds - self._waited) / seconds
        found = {"patches_per_s": round(self.patches / seconds, 2), "data_wait": round(wait, 4)}
        if place.device.type == "cuda":
            found["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(place.device) / 2**30, 3)
        return found


class Recorder:
    """metrics.jsonl and TensorBoard. Rows after the step that a run goes on from are taken away: they come again."""

    def __init__(self, job: Job, step: int, init_lines: list[str]):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        path = job.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
        write_json(job.folder / "init.json", init_lines)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(job.folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, float]) -> None:
        """Append a row; a value that is no number (NaN) becomes null."""
        self._file.write(json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n")
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush both, and end TensorBoard's thread."""
        self._file.close()
        self._board.close()


def _write_checkpoint(folder: Path, model, optimizer, loader, step) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict(), "step": step}
    torch.save(state, folder / CHECKPOINT_NAME)


def _restore(place: Place, model, optimizer, loader) -> int:
    """Load the newest checkpoint, if any. Returns the steps taken so far."""
    with place.restore() as folder:
        if folder is None:
            return 0
        state = torch.load(folder / CHECKPOINT_NAME, map_location=place.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])
    return state["step"]


def _write_weights(job: Job, model: ViewModel) -> None:
    recipe = describe_recipe(job.method.recipe)
    card = job.card | {"backbone": job.backbone, "image_size": job.image_size, "features": model.backbone.num_features}
    torch.save({name: tensor.cpu() for name, tensor in model.head.state_dict().items()}, job.folder / HEAD_NAME)
    save_backbone(model.backbone, job.folder, card | {"recipe": recipe, "mean": recipe["mean"], "std": recipe["std"]})


def plain_place(folder: Path, device: torch.device | None = None) -> Place:
    """This process alone, with checkpoints under folder/checkpoints; the newest one is kept."""
    checkpoints = folder / "checkpoints"

    def save(step: int, write: Callable[[Path], None]) -> None:
        partial, final = checkpoints / f".step-{step:09d}.partial", checkpoints / f"step-{step:09d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(checkpoints.glob("step-*"))[:-1]:
            shutil.rmtree(old)

    @contextlib.contextmanager
    def restore() -> Iterator[Path | None]:
        yield max(checkpoints.glob("step-*"), default=None)

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Place(rank=0, world_size=1, device=device, group=None, save=save, restore=restore)
