"""The stages' configs: one frozen dataclass each, every field a flag and a YAML key.

Fields marked identity=False (where things lie, how many workers, how often to log) do not decide what comes out, and are
no part of a stage's key.
"""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import restricted_string_type

from pipelines.recipes import RECIPES
from sharding.cli import option, required
from train.trainer.methods import METHODS, method_summaries

Precision = Literal["fp32", "bf16", "fp64"]
Optimizer = Literal["lars", "adam", "adamw", "sgd"]
Schedule = Literal["cosine", "constant"]
# Text and not numbers: what YAML makes of 2:8 without quotes is 128.
WorkerRange = restricted_string_type("WorkerRange", r"^\d+:\d+$", docstring="Fewest and most workers, such as 2:8.")

_DATA = "the shard set (from sharding/build.py): its folder, or its URL (s3://bucket/kidney, https://...)"
_CACHE = "GiB that $PATCHCLR_CACHE may hold of sets at URLs, on each node; default: all, and nothing is removed"
_NAME = "the run's name; its folder is STORAGE/NAME"
_SEED = "seed of everything random: order, views, initial weights"
_WORKERS = (
    "Ray Train workers (one GPU each where there are GPUs); LEAST:MOST, such as 2:8 (in YAML with quotes), for as many as the"
    " cluster has at a time; 0: in this process, without Ray"
)
_GPUS = (
    "GPUs of each worker: 1, 0 to train on CPUs, or a part of one (0.25) that leaves the rest to other runs; default: 1 where"
    " there are GPUs"
)
_CPUS = "cores of each worker; 0: an equal share of all, so that one run fills the cluster"
_THREADS = "threads that decode and augment, per worker; 0: the worker's share of the cores"
_STORAGE = "folder for runs, on a cluster one that all nodes share; or a URL that the driver can write to (s3://bucket/runs)"
_PRECISION = "numbers of the forward and backward pass: bf16 is autocast, fp64 is for tests"
_AUTO_PRECISION = _PRECISION + "; auto is bf16 where the GPUs have it, else fp32, and what a run began with when it goes on"
_OPTIMIZER = "lars as in SimCLR, adam, adamw or sgd (momentum 0.9)"
_SCHEDULE = "the learning rate after warm-up: half a cosine down to 0, or constant (with --warmup-epochs 0: throughout)"
_WARMUP = "epochs of linear warm-up, at most a tenth of all; then --schedule"
_BACKBONE = "a timm model name, hf-hub:OWNER/MODEL or local-dir:FOLDER; --init imagenet loads the weights that belong to it"
_IMAGE_SIZE = "side of a view, pixels"
_BATCH = "patches per step over all workers"


@dataclass(frozen=True)
class PretrainConfig:
    """Self-supervised pretraining of a backbone."""

    data: str = required(_DATA, identity=False)
    name: str = required(_NAME, identity=False)
    method: str = option("simclr", f"the pretext task. {method_summaries()}", choices=METHODS)
    recipe: str | None = option(
        None,
        "how patches are augmented (pipelines/recipes.py describes each); default: the method's own recipe",
        choices=RECIPES,
    )
    backbone: str = option("resnet18", _BACKBONE)
    init: str = option("scratch", "scratch, imagenet, an earlier run's name or folder, or a weights file", identity=False)
    split: str = option("train", "the split to learn from")
    fraction: float = option(1.0, "share of that split to use, 0 to 1 (5 %% lies inside 25 %%)")
    mix: list[str] = option(
        [], "further sets to learn from, SHARDS=WEIGHT ...: beside --data, whose weight is 1; places as in --data", identity=False
    )
    shuffle_window: int | None = option(
        None, "shuffle within so many shards at a time, for a set larger than memory or cache; default: all together"
    )
    image_size: int = option(224, _IMAGE_SIZE, least=1)
    batch_size: int = option(256, _BATCH, least=2)
    micro_batch: int | None = option(
        None,
        "for a batch larger than memory: so many patches per worker at a time, in two passes, with the loss of the whole batch."
        " Equal to the whole batch but for rounding and dropout, except with batch norm, whose statistics are then a"
        " micro-batch's; default: all at once",
    )
    projection_dim: int = option(128, "width of the projection head's output (simclr)")
    projection_layers: Literal[2, 3] = option(2, "layers of that head: 2, or 3 with batch norm as in SimCLR v2 (simclr)")
    temperature: float = option(0.5, "temperature of NT-Xent (simclr)")
    optimizer: Optimizer = option("lars", _OPTIMIZER)
    learning_rate: float | None = option(None, "peak learning rate; default by --lr-rule for lars and sgd, 3e-4 for adam")
    lr_rule: Literal["linear", "sqrt"] = option(
        "linear", "the default rate of lars and sgd: 0.3 x batch / 256, or 0.075 x sqrt(batch), which is higher below 4096"
    )
    schedule: Schedule = option("cosine", _SCHEDULE)
    weight_decay: float = option(1e-6, "decay of weights; biases and norms have none", least=0)
    epochs: int = option(100, "passes over the selected patches", least=1)
    warmup_epochs: float = option(10.0, _WARMUP, least=0)
    precision: Literal["auto", "fp32", "bf16", "fp64"] = option("auto", _AUTO_PRECISION)
    seed: int = option(42, _SEED, least=0)
    workers: WorkerRange | int = option(1, _WORKERS, identity=False)  # type: ignore[valid-type]
    gpus_per_worker: float | None = option(None, _GPUS, identity=False)
    cpus_per_worker: int = option(0, _CPUS, identity=False, least=0)
    threads: int = option(0, _THREADS, identity=False, least=0)
    compile: bool | None = option(None, "torch.compile the model; default: on a GPU where the compiler works", identity=False)
    channels_last: bool | None = option(None, "channels last in memory; default: on a GPU", identity=False)
    deterministic: bool = option(
        False,
        "only algorithms that give the same bits every time, and no TF32: slower on a GPU, no change on a CPU",
        identity=False,
    )
    profile: bool = option(False, "trace a few steps with torch's profiler, into the run's folder profile/", identity=False)
    log_every: int = option(10, "steps between two rows of metrics.jsonl", identity=False, least=1)
    probe_every: int = option(
        10,
        "epochs between two probes (a ridge classifier and kNN on frozen features, in metrics.jsonl); 0: none",
        identity=False,
        least=0,
    )
    probe_data: str | None = option(
        None, "the labelled shard set to probe on, its --split alone; default: --data where it has labels", identity=False
    )
    probe_patches: int = option(2048, "labelled patches that a probe looks at", identity=False, least=1)
    checkpoint_every: int = option(0, "steps between checkpoints; 0: one per epoch", identity=False, least=0)
    max_failures: int = option(
        3, "how often workers may fail without a new checkpoint since, and start again", identity=False, least=0
    )
    cache_gib: float | None = option(None, _CACHE, identity=False)
    storage: str = option("runs", _STORAGE, identity=False)


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a backbone on a labelled set."""

    data: str = required(_DATA, identity=False)
    backbone: str = option(
        "resnet18",
        "a run's name or folder, a weights file, scratch, imagenet, or (for --mode supervised) a backbone as for pretrain.py",
        identity=False,
    )
    mode: Literal["linear", "knn", "finetune", "supervised"] = option(
        "linear",
        "linear: a classifier on frozen features; knn: the nearest neighbours of frozen features vote; finetune: train all;"
        " supervised: train all from random weights",
    )
    name: str | None = option(None, "the run's name; default: made from backbone, mode, fractions and seeds", identity=False)
    architecture: str | None = option(
        None,
        "timm model name, where --backbone does not say what it is: scratch, imagenet, a file without a card",
        identity=False,
    )
    split: str = option("train", "the split whose labels are used")
    test_split: str = option("test", "the split to test on")
    validation_split: str | None = option(None, "a split to choose on, instead of a share of the labels")
    resplit: str | None = option(
        None, "cut the set anew instead of using its own splits, such as train=0.7,validation=0.15,test=0.15; by --seed"
    )
    group_aware: bool = option(False, "whole groups (slides, patients) on one side of --resplit and of the validation share")
    duplicates: Literal["together", "apart"] = option(
        "together", "exact copies of an image: on one side of --resplit and of the validation share, or apart if it so happens"
    )
    classes: list[str] = option([], "only these classes; default: all")
    leave_out: list[str] = option([], "all classes but these")
    fraction: list[float] = option([1.0], "shares of the labels to use, each evaluated, 0 to 1 (5 %% lies inside 50 %%)")
    cap: int | None = option(None, "at most so many labels of each class", least=1)
    balance: bool = option(False, "cut every class to the size of the smallest")
    validation: float = option(0.2, "share of the used labels that is chosen on: the regularisation, the best epoch")
    seeds: int = option(1, "so many seeds, from --seed on; results are their mean and deviation", least=1)
    protocol: Literal["lbfgs", "adam", "sgd"] = option(
        "lbfgs",
        "how a linear classifier learns: lbfgs to convergence with the decay that does best on the validation part; adam (3e-4,"
        " batch 64, 100 epochs) or sgd (0.2, batch 256, early stopping), with the weights of the best validation loss",
    )
    head: Literal["linear", "mlp"] = option("linear", "for --protocol adam and sgd: a linear layer, or two with ReLU between")
    neighbours: int = option(20, "neighbours that vote (knn)", least=1)
    image_size: int | None = option(None, _IMAGE_SIZE + "; default: the backbone's own", least=1)
    batch_size: int = option(64, _BATCH + " (finetune and supervised)", least=2)
    optimizer: Optimizer = option("adam", _OPTIMIZER)
    learning_rate: float | None = option(None, "peak learning rate; default 1e-3 for supervised, 1e-4 for finetune")
    schedule: Schedule = option("cosine", _SCHEDULE)
    weight_decay: float = option(1e-4, "decay of weights; biases and norms have none", least=0)
    epochs: int = option(50, "passes over the used labels, at most (finetune and supervised)", least=1)
    patience: int = option(
        10, "epochs without a lower validation loss after which training ends (finetune and supervised); 0: never", least=0
    )
    warmup_epochs: float = option(1.0, _WARMUP, least=0)
    precision: Precision = option("fp32", _PRECISION)
    seed: int = option(42, _SEED + ", and of which labels are used", least=0)
    draws: int = option(1000, "draws of the bootstrap by group that the intervals come from", least=1)
    workers: WorkerRange | int = option(0, _WORKERS, identity=False)  # type: ignore[valid-type]
    gpus_per_worker: float | None = option(None, _GPUS, identity=False)
    cpus_per_worker: int = option(0, _CPUS, identity=False, least=0)
    threads: int = option(0, _THREADS, identity=False, least=0)
    log_every: int = option(10, "steps between two rows of metrics.jsonl", identity=False, least=1)
    max_failures: int = option(
        3, "how often workers may fail without a new checkpoint since, and start again", identity=False, least=0
    )
    cache_gib: float | None = option(None, _CACHE, identity=False)
    storage: str = option("runs", _STORAGE, identity=False)


@dataclass(frozen=True)
class EmbedConfig:
    """A backbone's features of a set."""

    data: str = required(_DATA, identity=False)
    backbone: str = required("a run's name or folder, a weights file, scratch, or imagenet", identity=False)
    out: str = required("the folder to write; one that was begun goes on", identity=False)
    architecture: str | None = option(
        None,
        "timm model name, where --backbone does not say what it is: scratch, imagenet, a file without a card",
        identity=False,
    )
    split: str | None = option(None, "only this split; default: all patches")
    image_size: int | None = option(None, _IMAGE_SIZE + "; default: the backbone's own", least=1)
    seed: int = option(42, "seed of the weights of --backbone scratch", least=0)
    workers: WorkerRange | int = option(0, _WORKERS, identity=False)  # type: ignore[valid-type]
    gpus_per_worker: float | None = option(None, _GPUS, identity=False)
    cpus_per_worker: int = option(0, _CPUS, identity=False, least=0)
    threads: int = option(0, _THREADS, identity=False, least=0)
    cache_gib: float | None = option(None, _CACHE, identity=False)
    storage: str = option("runs", _STORAGE, identity=False)


def worker_range(workers: str | int) -> tuple[int, int]:
    """Fewest and most workers of --workers; (0, 0) without Ray. Raises ValueError for what is neither a number nor a range."""
    low, _, high = str(workers).partition(":")
    least, most = int(low), int(high or low)
    if not (0 < least <= most or least == most == 0):
        raise ValueError(f"--workers {workers}: give a number from 0, or LEAST:MOST such as 2:8, from 1")
    return least, most
