"""A summary of the model and its optimiser for the console, printed before workers start."""

from models.backbones import build_backbone
from models.lars import describe_groups, parameter_groups
from models.weights import apply_init
from train.trainer.loop import Job, ViewModel
from train.trainer.methods import Method


def describe_model(
    method: Method, *, backbone: str, image_size: int, init: str, weight_decay: float, optimizer: str
) -> list[str]:
    """Lines for the console: which weights were and weren't loaded, and which groups of them are trained how.

    init: as Job's. The model is built as every worker will build it, and dropped, in a second or two. So a mistake shows
    before Ray starts: raises ValueError for a backbone that is not known, an image size that it cannot take, weights that
    cannot be had or do not fit, and a head that cannot be.
    """
    built = build_backbone(backbone, image_size)
    lines = apply_init(built, backbone, init)
    head = method.build_head(int(built.num_features))  # type: ignore[arg-type]
    lines.append(f"head: random weights, {sum(p.numel() for p in head.parameters()):,} numbers")
    return lines + describe_groups(parameter_groups(ViewModel(built, head), weight_decay), adapted=optimizer == "lars")


def describe_rate(job: Job) -> str:
    """A line for the console: the optimiser and its learning-rate schedule."""
    warmup = f"{job.warmup_epochs:g} epochs of warm-up, then " if job.warmup_epochs > 0 else ""
    schedule = "half a cosine down to 0" if job.schedule == "cosine" else "constant"
    return f"{job.optimizer}: learning rate {job.peak_learning_rate:g}, {warmup}{schedule}"
