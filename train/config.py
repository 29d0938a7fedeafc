"""The stages' configs: one frozen dataclass each, every field a flag and a YAML key.

Fields marked identity=False (paths, number of workers, logging interval) do not affect the results, and are not part of a
stage's key.
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
# Text, because YAML reads an unquoted 2:8 as the number 128.
WorkerRange = restricted_string_type("WorkerRange", r"^\d+:\d+$", docstring="MIN:MAX")

_DATA = "the shard set (from sharding/build.py): its folder, or its URL (s3://bucket/kidney, https://...)"
_CACHE = "size limit of $PATCHCLR_CACHE on each node, in GiB, for sets at URLs; default: no limit"
_NAME = "the run's name; its folder is STORAGE/NAME"
_SEED = "seed of all random numbers: order, views, initial weights"
_WORKERS = (
    "Ray Train workers, with one GPU each if there are GPUs; MIN:MAX, such as 2:8 (quoted in YAML), uses as many as the cluster"
    " can provide at the time; 0: train in this process, without Ray"
)
_GPUS = (
    "GPUs per worker: 1, 0 to train on CPUs, or a fraction such as 0.25, which leaves the rest to other runs; default: 1 if"
    " there are GPUs"
)
_CPUS = "CPU cores per worker; 0: an equal share of all cores, so that one run fills the cluster"
_THREADS = "decoding and augmentation threads per worker; 0: one for each of the worker's cores"
_STORAGE = "folder of runs (on a cluster: one that all nodes share), or a writable URL such as s3://bucket/runs"
_PRIVATE = "record no host, no command, and of folders and URLs only the last part, so that the run's folder can be shared"
_PRECISION = "precision of the forward and backward pass: bf16 uses autocast; fp64 is for tests"
_AUTO_PRECISION = _PRECISION + "; auto: bf16 if the GPUs support it, else fp32; a resumed run keeps its precision"
_OPTIMIZER = "lars as in SimCLR; adam; adamw; sgd with momentum 0.9"
_SCHEDULE = "learning rate after the warm-up: half a cosine down to 0, or constant"
_WARMUP = "epochs of linear warm-up, at most a tenth of all epochs"
_BACKBONE = "a timm model name, hf-hub:OWNER/MODEL or local-dir:FOLDER; --init imagenet loads its pretrained weights"
_IMAGE_SIZE = "side of a view in pixels"
_BATCH = "patches per step, over all workers"


@dataclass(frozen=True)
class PretrainConfig:
    """Self-supervised pretraining of a backbone."""

    data: str = required(_DATA, identity=False)
    name: str = required(_NAME, identity=False)
    method: str = option("simclr", f"the pretext task; {method_summaries()}", choices=METHODS)
    recipe: str | None = option(
        None,
        "the augmentation (docs/loading.md describes each recipe); default: the recipe of the method",
        choices=RECIPES,
    )
    backbone: str = option("resnet18", _BACKBONE)
    init: str = option("scratch", "scratch, imagenet, an earlier run's name or folder, or a weights file", identity=False)
    split: str = option("train", "the split to train on")
    fraction: float = option(1.0, "fraction of that split to use, from 0 to 1; smaller fractions are subsets of larger ones")
    mix: list[str] = option(
        [], "further sets to train on, as SHARDS=WEIGHT, each a folder or a URL; the weight of --data is 1", identity=False
    )
    shuffle_window: int | None = option(
        None, "shuffle within this many shards at a time, for sets larger than memory or cache; default: all at once"
    )
    image_size: int = option(224, _IMAGE_SIZE, least=1)
    batch_size: int = option(256, _BATCH, least=2)
    micro_batch: int | None = option(
        None,
        "patches per worker at a time, for batches larger than memory: two passes compute the loss of the whole batch. The"
        " result is the same up to rounding and dropout, except that batch norm uses the statistics of a micro-batch;"
        " default: all at once",
    )
    projection_dim: int = option(128, "output width of the projection head (simclr)")
    projection_layers: Literal[2, 3] = option(
        2, "layers of the projection head: 2, or 3 with batch norm as in SimCLR v2 (simclr)"
    )
    temperature: float = option(0.5, "temperature of NT-Xent (simclr)")
    optimizer: Optimizer = option("lars", _OPTIMIZER)
    learning_rate: float | None = option(
        None, "peak learning rate; default: by --lr-rule for lars and sgd, 3e-4 for adam and adamw"
    )
    lr_rule: Literal["linear", "sqrt"] = option(
        "linear",
        "default learning rate of lars and sgd: 0.3 x batch / 256, or 0.075 x sqrt(batch), which is higher below batch 4096",
    )
    schedule: Schedule = option("cosine", _SCHEDULE)
    weight_decay: float = option(1e-6, "weight decay; not applied to biases and normalisation parameters", least=0)
    epochs: int = option(100, "passes over the selected patches", least=1)
    warmup_epochs: float = option(10.0, _WARMUP, least=0)
    precision: Literal["auto", "fp32", "bf16", "fp64"] = option("auto", _AUTO_PRECISION)
    seed: int = option(42, _SEED, least=0)
    workers: WorkerRange | int = option(1, _WORKERS, identity=False)  # type: ignore[valid-type]
    gpus_per_worker: float | None = option(None, _GPUS, identity=False)
    cpus_per_worker: int = option(0, _CPUS, identity=False, least=0)
    threads: int = option(0, _THREADS, identity=False, least=0)
    compile: bool | None = option(
        None, "compile the model with torch.compile; default: on a GPU, if the compiler works", identity=False
    )
    channels_last: bool | None = option(None, "channels-last memory format; default: on a GPU", identity=False)
    deterministic: bool = option(
        False,
        "bitwise reproducible algorithms only, and no TF32: slower on a GPU, no change on a CPU",
        identity=False,
    )
    profile: bool = option(False, "save a torch profiler trace of a few steps to the run's folder profile/", identity=False)
    log_every: int = option(10, "steps between rows of metrics.jsonl", identity=False, least=1)
    probe_every: int = option(
        10,
        "epochs between probes (a ridge classifier and kNN on frozen features); 0: no probes",
        identity=False,
        least=0,
    )
    probe_data: str | None = option(
        None, "labelled shard set for the probe, of which only --split is used; default: --data, if it has labels", identity=False
    )
    probe_patches: int = option(2048, "maximum number of labelled patches per probe", identity=False, least=1)
    checkpoint_every: int = option(0, "steps between checkpoints; 0: one checkpoint per epoch", identity=False, least=0)
    max_failures: int = option(
        3,
        "restart workers after at most this many consecutive failures without a new checkpoint",
        identity=False,
        least=0,
    )
    on_bad_patch: Literal["stop", "skip"] = option(
        "stop",
        "when a patch was damaged after packing: stop the run, or skip the patch, in whose place another one is drawn; the run"
        " still stops if more than 1 percent are damaged",
        identity=False,
    )
    cache_gib: float | None = option(None, _CACHE, identity=False)
    storage: str = option("runs", _STORAGE, identity=False)
    private: bool = option(False, _PRIVATE, identity=False)


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a backbone on a labelled set."""

    data: str = required(_DATA, identity=False)
    backbone: str = option(
        "resnet18",
        "a run's name or folder, a weights file, scratch or imagenet; with --mode supervised also a model as in pretrain.py",
        identity=False,
    )
    mode: Literal["linear", "knn", "finetune", "supervised"] = option(
        "linear",
        "linear: a classifier on frozen features; knn: nearest neighbours on frozen features; finetune: train all weights;"
        " supervised: train all weights from random ones",
    )
    name: str | None = option(None, "the run's name; default: built from backbone, mode, fractions and seeds", identity=False)
    architecture: str | None = option(
        None,
        "timm model name, needed if --backbone does not imply it: scratch, imagenet, or a file without a model card",
        identity=False,
    )
    split: str = option("train", "the split whose labels are used")
    test_split: str = option("test", "the split to test on")
    validation_split: str | None = option(None, "a split to validate on, instead of a share of the labels")
    resplit: str | None = option(
        None, "new splits instead of those of the set, such as train=0.7,validation=0.15,test=0.15; drawn by --seed"
    )
    group_aware: bool = option(False, "keep each group (slide, patient) on one side of --resplit and of --validation")
    duplicates: Literal["together", "apart"] = option(
        "together", "together: keep exact copies of an image on one side of --resplit and of --validation; apart: ignore copies"
    )
    classes: list[str] = option([], "use only these classes; default: all")
    leave_out: list[str] = option([], "use all classes except these")
    fraction: list[float] = option(
        [1.0], "fractions of the labels to use, from 0 to 1; each is evaluated, and smaller ones are subsets of larger ones"
    )
    cap: int | None = option(None, "use at most this many labels per class", least=1)
    balance: bool = option(False, "reduce every class to the size of the smallest")
    validation: float = option(0.2, "share of the used labels to validate on, which selects the regularisation or the best epoch")
    seeds: int = option(1, "number of seeds, counted up from --seed; results are their mean and standard deviation", least=1)
    protocol: Literal["lbfgs", "adam", "sgd"] = option(
        "lbfgs",
        "how the linear classifier is fitted: lbfgs to convergence, with the decay that is best on the validation part; adam"
        " (rate 3e-4, batch 64, 100 epochs) and sgd (rate 0.2, batch 256, early stopping), with the weights of the best"
        " validation loss",
    )
    head: Literal["linear", "mlp"] = option(
        "linear", "with --protocol adam or sgd: one linear layer, or two with a ReLU in between"
    )
    neighbours: int = option(20, "number of neighbours (knn)", least=1)
    image_size: int | None = option(None, _IMAGE_SIZE + "; default: the backbone's own", least=1)
    batch_size: int = option(64, _BATCH + " (finetune and supervised)", least=2)
    optimizer: Optimizer = option("adam", _OPTIMIZER)
    learning_rate: float | None = option(None, "peak learning rate; default: 1e-3 for supervised, 1e-4 for finetune")
    schedule: Schedule = option("cosine", _SCHEDULE)
    weight_decay: float = option(1e-4, "weight decay; not applied to biases and normalisation parameters", least=0)
    epochs: int = option(50, "maximum number of passes over the used labels (finetune and supervised)", least=1)
    patience: int = option(
        10, "stop after this many epochs without a lower validation loss (finetune and supervised); 0: never", least=0
    )
    warmup_epochs: float = option(1.0, _WARMUP, least=0)
    precision: Precision = option("fp32", _PRECISION)
    seed: int = option(42, _SEED + ", selection of labels", least=0)
    draws: int = option(1000, "bootstrap samples for the confidence intervals", least=1)
    workers: WorkerRange | int = option(0, _WORKERS, identity=False)  # type: ignore[valid-type]
    gpus_per_worker: float | None = option(None, _GPUS, identity=False)
    cpus_per_worker: int = option(0, _CPUS, identity=False, least=0)
    threads: int = option(0, _THREADS, identity=False, least=0)
    log_every: int = option(10, "steps between rows of metrics.jsonl", identity=False, least=1)
    max_failures: int = option(
        3,
        "restart workers after at most this many consecutive failures without a new checkpoint",
        identity=False,
        least=0,
    )
    cache_gib: float | None = option(None, _CACHE, identity=False)
    storage: str = option("runs", _STORAGE, identity=False)
    private: bool = option(False, _PRIVATE, identity=False)


@dataclass(frozen=True)
class EmbedConfig:
    """A backbone's features of a set."""

    data: str = required(_DATA, identity=False)
    backbone: str = required("a run's name or folder, a weights file, scratch, or imagenet", identity=False)
    out: str = required("the output folder; run the command again to complete it", identity=False)
    architecture: str | None = option(
        None,
        "timm model name, needed if --backbone does not imply it: scratch, imagenet, or a file without a model card",
        identity=False,
    )
    split: str | None = option(None, "embed only this split; default: all patches")
    image_size: int | None = option(None, _IMAGE_SIZE + "; default: the backbone's own", least=1)
    seed: int = option(42, "seed of the random weights of --backbone scratch", least=0)
    workers: WorkerRange | int = option(0, _WORKERS, identity=False)  # type: ignore[valid-type]
    gpus_per_worker: float | None = option(None, _GPUS, identity=False)
    cpus_per_worker: int = option(0, _CPUS, identity=False, least=0)
    threads: int = option(0, _THREADS, identity=False, least=0)
    cache_gib: float | None = option(None, _CACHE, identity=False)
    storage: str = option("runs", _STORAGE, identity=False)


def worker_range(workers: str | int) -> tuple[int, int]:
    """Minimum and maximum of --workers; (0, 0) without Ray. Raises ValueError if it is neither a number nor a range."""
    low, _, high = str(workers).partition(":")
    least, most = int(low), int(high or low)
    if not (0 < least <= most or least == most == 0):
        raise ValueError(f"--workers {workers}: give a number from 0, or MIN:MAX such as 2:8, from 1")
    return least, most
