"""Each row of metrics.jsonl as Prometheus gauges: their names and descriptions.

Ray exports them (train/cluster/launcher.py) with `ray_` before each name; the dashboard in monitoring/ uses those names.
"""

from pathlib import Path

from train.records.remote_run import CELLS
from train.trainer.methods import METHODS, Method, Supervised

PREFIX = "patchclr_"

# Metrics of every run; a method describes its own. A metric without a description is a gauge too.
_DESCRIPTIONS = {
    "progress": "Steps done as a fraction of all, 0 to 1",
    "epoch": "Epoch of the newest row, counted from 1",
    "step": "Steps done",
    "learning_rate": "Learning rate of the newest step",
    "loss": "Loss of the newest step, the mean over the workers",
    "gradient_norm": "Norm of the newest step's gradient",
    "validation_loss": "Log loss on the validation part",
    "validation_accuracy": "Accuracy on the validation part",
    "probe_accuracy": "Accuracy of a ridge classifier on frozen features",
    "probe_balanced_accuracy": "Balanced accuracy of a ridge classifier on frozen features",
    "probe_knn_accuracy": "Accuracy of the nearest neighbours on frozen features",
    "probe_knn_balanced_accuracy": "Balanced accuracy of the nearest neighbours on frozen features",
    "patches_per_s": "Patches per second, over all workers",
    "images_per_s": "Images (views of patches) per second, over all workers",
    "data_wait": "Fraction of time that rank 0 waited for data, 0 to 1",
    "gpu_memory_gib": "Peak tensor memory on rank 0's GPU so far, GiB",
}


def readings(row: dict[str, float], steps: int) -> dict[str, float]:
    """Values by the gauge's name. row: of metrics.jsonl; NaN stays NaN. steps: of the complete run."""
    shown = row | {"progress": row["step"] / steps, "epoch": row["epoch"] + 1}
    return {PREFIX + name: float(value) for name, value in shown.items()}


def descriptions() -> dict[str, str]:
    """What each metric of a run is, by its name: those of every run and of every method."""
    methods: list[type[Method]] = [*METHODS.values(), Supervised]
    return _DESCRIPTIONS | {name: text for method in methods for name, text in method.descriptions.items()}


def meaning(gauge: str) -> str:
    """A gauge's help text, empty if it has none."""
    return descriptions().get(gauge.removeprefix(PREFIX), "")


def shown_name(folder: Path) -> str:
    """What a person knows a run by, from its folder: its name, and for one below another run (a fraction of the labels, say)
    that run's name before it. Other characters than ASCII's become their codes: Ray's metrics take no others."""
    name = folder.name.encode("ascii", "backslashreplace").decode()
    return f"{shown_name(folder.parent.parent)}/{name}" if folder.parent.name == CELLS else name
