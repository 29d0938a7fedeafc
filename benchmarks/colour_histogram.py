"""The baseline for features: how well do colours alone tell the classes apart?

    python benchmarks/colour_histogram.py --data shards/breast
    python benchmarks/colour_histogram.py --data shards/breast --fraction 0.05 0.25 0.5 --seeds 5

A patch is its joint RGB histogram; its class is that of the 5 nearest training patches. Learnt features that do not beat
this have learnt the stain. It judges on the same patches as train/evaluate.py does for the same split, fraction and seed.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from harness import check_at_least, script
from PIL import Image

from pipelines.shard_reader import ShardReader
from sharding.cli import option, required
from sharding.manifest import class_names
from sharding.process_pool import available_cores
from sharding.selection import select
from train.scoring.metrics import METRICS, score

BINS = 8  # per channel
NEIGHBOURS = 5
_ROWS = 1024  # test patches whose distances are held at a time
_SHOWN = ("accuracy", "balanced_accuracy")


@dataclass(frozen=True)
class Config:
    """What is judged on what."""

    data: str = required("folder of the labelled shard set (from sharding/build.py)")
    split: str = option("train", "the split whose labels are used")
    test_split: str = option("test", "the split to judge on")
    fraction: list[float] = option([1.0], "shares of the labels to use, 0 to 1")
    seed: int = option(42, "seed of which labels are used")
    seeds: int = option(1, "how many seeds, that one and those after it: other labels each")


def histograms(reader: ShardReader, ids: np.ndarray) -> np.ndarray:
    """(n, BINS^3) float32: the square roots of each patch's colour shares, of length 1.

    The Euclidean distance of two such rows is, but for a factor, Hellinger's distance between the two histograms.
    """
    with ThreadPoolExecutor(available_cores()) as pool:  # Pillow decodes without Python's lock
        found = np.stack(list(pool.map(lambda i: _colour_counts(reader.read(np.array([i]))[0]), ids))).astype(np.float64)
    return np.sqrt(found / found.sum(1, keepdims=True)).astype(np.float32)


def _colour_counts(encoded: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        pixels = np.asarray(image.convert("RGB"))
    codes = pixels.reshape(-1, 3).astype(np.int64) * BINS // 256
    return np.bincount(codes @ np.array([BINS * BINS, BINS, 1]), minlength=BINS**3)


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


def judge(reader: ShardReader, train: list[np.ndarray], test: np.ndarray) -> list[dict]:
    """The metrics of `train.scoring.metrics.score` on the test ids, for each array of ids to learn from.

    Raises ValueError where there are no classes, or where one of these patches has no label.
    """
    classes, labels = len(class_names(reader.folder)), reader.labels
    ids = np.unique(np.concatenate([*train, test]))
    if classes < 2 or (labels[ids] < 0).any():
        raise ValueError(f"{reader.folder}: judging needs labels of at least two classes (build with {{class}})")
    rows = histograms(reader, ids)
    judged = rows[np.searchsorted(ids, test)]
    votes = [vote_shares(rows[np.searchsorted(ids, part)], labels[part], judged, classes=classes) for part in train]
    return [score(shares, labels[test]) for shares in votes]


def main(config: Config) -> None:
    check_at_least(config, seeds=1)
    if config.split == config.test_split:
        raise ValueError(f"--split and --test-split are both {config.split!r}: nothing is judged on what it learnt from")
    reader, seeds = ShardReader(config.data), range(config.seed, config.seed + config.seeds)
    test = select(reader.manifest, split=config.test_split)
    places = [(fraction, seed) for fraction in config.fraction for seed in seeds]
    train = [select(reader.manifest, split=config.split, fraction=fraction, seed=seed) for fraction, seed in places]
    found = judge(reader, train, test)
    for i, ((fraction, seed), ids, metrics) in enumerate(zip(places, train, found, strict=True), start=1):
        shown = ", ".join(f"{METRICS[name].title} {metrics[name]:.3f}" for name in _SHOWN)
        print(f"{fraction:.3g} of the labels, seed {seed}: {shown}, {len(ids):,} train and {len(test):,} test patches")
        if config.seeds > 1 and i % config.seeds == 0:
            of_seeds = found[i - config.seeds : i]
            print(f"mean of {config.seeds} seeds: {', '.join(_mean(name, of_seeds) for name in _SHOWN)}")


def _mean(name: str, found: list[dict]) -> str:
    values = [metrics[name] for metrics in found]
    return f"{METRICS[name].title} {np.mean(values):.3f} (standard deviation {np.std(values, ddof=1):.3f})"


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
