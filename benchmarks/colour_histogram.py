"""The baseline for features: how well do colours alone tell the classes apart?

    python benchmarks/colour_histogram.py --data shards/breast
    python benchmarks/colour_histogram.py --data shards/breast --fraction 0.05 0.25 0.5 --seeds 5
    python benchmarks/colour_histogram.py --data shards/breast --folds 4

A patch is its joint RGB histogram; its class is that of the 5 nearest training patches. Learnt features that do not beat
this have learnt the stain. It judges on the same patches as train/evaluate.py does for the same split, fraction and seed.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from harness import script
from PIL import Image

from pipelines.shard_reader import ShardReader
from sharding.cli import option, required
from sharding.manifest import class_names, decoded
from sharding.process_pool import available_cores
from sharding.selection import select
from sharding.splits.groups import split_groups
from train.scoring.metrics import METRICS, score

BINS = 8  # per channel
NEIGHBOURS = 5
_ROWS = 1024  # test patches whose distances are held at a time


@dataclass(frozen=True)
class Config:
    """What is judged on what."""

    data: str = required("folder of the labelled shard set (from sharding/build.py)")
    split: str = option("train", "the split whose labels are used")
    test_split: str = option("test", "the split to judge on")
    fraction: list[float] = option([1.0], "shares of the labels to use, 0 to 1")
    seed: int = option(42, "seed of which labels are used, and of the folds")
    seeds: int = option(1, "how many seeds, that one and those after it: other labels each")
    folds: int = option(0, "judge on so many folds of whole groups instead of on the set's split; 0: on the split")


@dataclass(frozen=True)
class Fold:
    """Patch ids to learn from and to judge on."""

    train: np.ndarray
    test: np.ndarray


def histograms(reader: ShardReader, ids: np.ndarray, *, bins: int = BINS) -> np.ndarray:
    """(n, bins^3) float32: the square roots of each patch's colour shares, of length 1.

    The Euclidean distance of two such rows is, but for a factor, Hellinger's distance between the two histograms.
    """
    with ThreadPoolExecutor(available_cores()) as pool:  # Pillow decodes without Python's lock
        counts = pool.map(lambda i: _colour_counts(reader.read(np.array([i]))[0], bins), ids)
        found = np.stack(list(counts)).astype(np.float64)
    return np.sqrt(found / found.sum(1, keepdims=True)).astype(np.float32)


def _colour_counts(encoded: np.ndarray, bins: int) -> np.ndarray:
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        pixels = np.asarray(image.convert("RGB"))
    codes = pixels.reshape(-1, 3).astype(np.int64) * bins // 256
    return np.bincount(codes @ np.array([bins * bins, bins, 1]), minlength=bins**3)


def vote_shares(train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int, k: int = NEIGHBOURS) -> np.ndarray:
    """(n, classes) float64: how large a share of each test row's k nearest training rows has each class.

    train: (m, F) and labels: (m,); test: (n, F). Of equally near rows the earlier one counts; k is m at most. Of classes
    with equally many votes, the one with the nearest row has a share that is larger by less than one in a million.
    """
    k = min(k, len(train))
    # Each rank's bonus is more than those of all further ranks together, and too small to outweigh a vote.
    votes = 1 + 1e-6 * 0.5 ** np.arange(1, k + 1)
    votes /= votes.sum()
    train = train.astype(np.float64)
    lengths = (train**2).sum(1)
    shares = np.empty((len(test), classes))
    for start in range(0, len(test), _ROWS):
        part = test[start : start + _ROWS].astype(np.float64)
        squares = lengths - 2 * part @ train.T  # but for the test row's own length, which changes no order
        nearest = labels[np.argsort(squares, axis=1, kind="stable")[:, :k]]
        for label in range(classes):
            shares[start : start + len(part), label] = (nearest == label) @ votes
    return shares / shares.sum(1, keepdims=True)


def the_split(reader: ShardReader, *, split: str, test_split: str, fraction: float, seed: int) -> Fold:
    """The patches that train/evaluate.py learns from and judges on.

    Raises ValueError for splits that are not there or the same.
    """
    if split == test_split:
        raise ValueError(f"--split and --test-split are both {split!r}: nothing is judged on what it learnt from")
    train = select(reader.manifest, split=split, fraction=fraction, seed=seed)
    return Fold(train, select(reader.manifest, split=test_split))


def group_folds(reader: ShardReader, *, folds: int, fraction: float, seed: int) -> list[Fold]:
    """So many folds over the whole set, of whole groups, with each class spread as evenly as the groups allow.

    fraction: of the labels outside a fold that are learnt from. Raises ValueError where there are too few groups.
    """
    groups, names = decoded(reader.manifest["group"])
    if (groups < 0).any():
        raise ValueError(f"{reader.folder}: {(groups < 0).sum():,} patches have no group: build the set with --group-by")
    if not 2 <= folds <= len(names):
        raise ValueError(f"--folds {folds} is out of range: give 2 to {len(names)}, the number of groups in {reader.folder}")
    place = split_groups(reader.labels, groups, names, {str(fold): 1 / folds for fold in range(folds)}, seed=seed)
    kept = np.isin(np.arange(len(reader)), select(reader.manifest, fraction=fraction, seed=seed))
    return [Fold(np.flatnonzero((place != fold) & kept), np.flatnonzero(place == fold)) for fold in range(folds)]


def judge(reader: ShardReader, folds: Sequence[Fold]) -> Iterator[dict]:
    """The metrics of `train.scoring.metrics.score` for 5 nearest neighbours on colour histograms, fold by fold.

    Raises ValueError where there are no classes, or where patches of a fold have no label.
    """
    classes, labels = len(class_names(reader.folder)), reader.labels
    ids = np.unique(np.concatenate([part for fold in folds for part in (fold.train, fold.test)]))
    if classes < 2 or (labels[ids] < 0).any():
        raise ValueError(f"{reader.folder}: judging needs labels of at least two classes (build with {{class}})")
    rows = histograms(reader, ids)
    for fold in folds:
        train, test = (rows[np.searchsorted(ids, part)] for part in (fold.train, fold.test))
        yield score(vote_shares(train, labels[fold.train], test, classes=classes), labels[fold.test])


def main(config: Config) -> None:
    reader = ShardReader(config.data)
    if config.seeds < 1 or not config.fraction:
        raise ValueError(f"--seeds {config.seeds}, --fraction {config.fraction}: give at least one of each")
    if not config.folds:
        _judge_split(reader, config)
        return
    if config.seeds > 1 or len(config.fraction) > 1:
        raise ValueError("--folds goes with one --fraction and one seed")
    folds = group_folds(reader, folds=config.folds, fraction=config.fraction[0], seed=config.seed)
    found = []
    for number, (fold, metrics) in enumerate(zip(folds, judge(reader, folds), strict=True), start=1):
        found.append(metrics)
        print(_line(f"fold {number}", fold, metrics), flush=True)
    print(f"mean of {config.folds} folds: {', '.join(_spread(name, found) for name in ('accuracy', 'balanced_accuracy'))}")


def _judge_split(reader: ShardReader, config: Config) -> None:
    places = [(fraction, config.seed + number) for fraction in config.fraction for number in range(config.seeds)]
    splits = {"split": config.split, "test_split": config.test_split}
    folds = [the_split(reader, fraction=fraction, seed=seed, **splits) for fraction, seed in places]
    title, found = f"{config.split} -> {config.test_split}", list(judge(reader, folds))
    for start in range(0, len(places), config.seeds):
        here = slice(start, start + config.seeds)
        for (_, seed), fold, metrics in zip(places[here], folds[here], found[here], strict=True):
            print(
                _line(title if len(places) == 1 else f"{title}, {places[start][0]:.3g} of the labels, seed {seed}", fold, metrics)
            )
        if config.seeds > 1:
            means = ", ".join(_spread(name, found[here]) for name in ("accuracy", "balanced_accuracy"))
            print(f"mean of {config.seeds} seeds: {means}")


def _line(title: str, fold: Fold, metrics: dict) -> str:
    shown = ", ".join(f"{METRICS[name].title} {metrics[name]:.3f}" for name in ("accuracy", "balanced_accuracy"))
    return f"{title}: {shown}, {len(fold.train):,} train and {len(fold.test):,} test patches"


def _spread(name: str, metrics: list[dict]) -> str:
    values = [each[name] for each in metrics]
    return f"{METRICS[name].title} {np.mean(values):.3f} (standard deviation {np.std(values, ddof=1):.3f})"


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
