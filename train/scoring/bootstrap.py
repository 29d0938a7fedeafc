"""Bootstrap intervals of metrics, resampled by group, and standard deviations over seeds.

Patches of one slide are alike, so a thousand of them are not a thousand independent observations. The bootstrap therefore draws
groups (slides or patients) with replacement, each with all its patches.
Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13 (percentile intervals); Field and Welsh 2007,
"Bootstrapping clustered data" (drawing groups).

Shapes: n patches, U units (groups, or patches on their own), D draws.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from sharding.philox import uniforms
from train.scoring.metrics import BINS, METRICS, Sums, Terms, auroc, compute_metrics, terms_of

# Of fewer groups than this an interval says too little to lean on. It comes out too narrow, since slides that were not seen
# cannot be drawn: in the simulation of tests/train/scoring/test_bootstrap.py, intervals of 95 % held the truth in 94 % of the
# cases with 30 groups, 89 % with 10, 82 % with 5 and 77 % with 3 (600 simulations each; by patch 56 to 61 %, however many).
FEW_UNITS = 10

_CELLS = 250_000  # patches (or sums) x draws at a time: 2 MB an array


class Difference(NamedTuple):
    """Of two models' paired draws, the first less the second: the interval's ends, and the share of draws above 0."""

    low: float
    high: float
    above: float


def count_units(groups: np.ndarray | None, patches: int) -> int:
    """How many units are resampled, for the report beside an interval (see FEW_UNITS). groups: as in `bootstrap`."""
    return _units(groups, patches)[1]


def bootstrap(
    probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, *, draws: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Each figure of METRICS in each draw: (draws,) float64, the value of `train.scoring.metrics.score` on the drawn patches.

    probabilities: (n, K); labels: (n,), both as in `score`. groups: (n,) whole numbers, -1 where the group is not known: such a
    patch is a unit of its own; None: all are. A sample has as many units as the data, drawn with replacement; an AUROC is NaN
    in a draw in which only one class occurs.
    Draws are a function of (seed, number of units) alone, units in the order of the groups' numbers and then of the patches
    without one: models evaluated on the same patches in the same order are drawn alike, and what they have in common cancels in
    `difference`. The time is proportional to draws x n x K, the memory to n x K.
    Raises ValueError when a probability is not a number, or the seed is out of range.
    """
    assert draws > 0, draws
    terms = terms_of(probabilities, labels)
    unit_n, units = _units(groups, len(labels))
    sums_CU = _sums(terms, unit_n, units)
    classes, cells = len(terms.ranks), len(terms.ranks) ** 2
    at_a_time = max(1, _CELLS // max(len(unit_n), sums_CU.shape[0]))
    parts = []
    for start in range(0, draws, at_a_time):
        times_UD = draw_units(units, range(start, min(start + at_a_time, draws)), seed=seed)
        sums_CD, times_nD = sums_CU @ times_UD, times_UD[unit_n]
        confusion_KKD = sums_CD[:cells].reshape(classes, classes, -1)
        auroc_KD = np.stack([auroc(ranks, times_nD) for ranks in terms.ranks])
        parts.append(compute_metrics(Sums(confusion_KKD, sums_CD[cells], sums_CD[cells + 1 :], auroc_KD)))
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def draw_units(units: int, draws: range, *, seed: int) -> np.ndarray:
    """How often each unit is drawn in each of the draws, which count from 0: (U, D) float64, columns summing to U."""
    blocks = -(-units // 4)  # four numbers for each id
    numbers = uniforms(np.arange(draws.start * blocks, draws.stop * blocks), 4, seed=seed, stream="bootstrap")
    drawn_DU = (numbers.reshape(len(draws), -1)[:, :units] * units).astype(np.int64)
    where = drawn_DU * len(draws) + np.arange(len(draws))[:, None]
    return np.bincount(where.ravel(), minlength=units * len(draws)).reshape(units, -1).astype(np.float64)


def _units(groups, patches):
    """(n,) each patch's unit, and how many there are."""
    if groups is None:
        return np.arange(patches), patches
    assert groups.shape == (patches,) and np.issubdtype(groups.dtype, np.integer), (groups.shape, groups.dtype)
    known = groups >= 0
    names, codes = np.unique(groups[known], return_inverse=True)
    units = len(names) + int((~known).sum())
    unit_n = np.empty(patches, np.int64)
    unit_n[known], unit_n[~known] = codes, np.arange(len(names), units)
    return unit_n, units


def _sums(terms: Terms, unit_n, units):
    """(K * K + 1 + BINS, U) sums over each unit's patches: counts of the confusion matrix, loss, and gaps by bin. Sparse, since
    a unit of one patch adds to three of them."""
    classes = len(terms.ranks)
    cell, loss = terms.label * classes + terms.guess, np.full(len(unit_n), classes**2)
    rows = np.concatenate([cell, loss, loss + 1 + terms.bin])
    values = np.concatenate([np.ones(len(unit_n)), terms.loss, terms.gap])
    return sparse.coo_array((values, (rows, np.tile(unit_n, 3))), shape=(classes**2 + 1 + BINS, units)).tocsr()


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The ends between which that share of the draws lies, with equally many below and above: a percentile interval.

    values: (D,); draws without a value (NaN) are left out, and where none has one both ends are NaN. level: 0 to 1.
    """
    assert 0 < level < 1, level
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> Difference:
    """How much more the first model's figure is than the second's, on the same patches. (D,) draws each, of the same groups and
    seed; those without a value (NaN) are left out. A draw in which both are equal is not above 0."""
    assert first.shape == second.shape, (first.shape, second.shape)
    less = first - second
    known = less[~np.isnan(less)]
    return Difference(*interval(less, level), float((known > 0).mean()) if len(known) else float("nan"))


def combine(draws_per_seed: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The draws of the mean over seeds: (D,) for each figure, from the `bootstrap` of each seed's model on the same patches.

    Its interval is of other slides for these models; what another seed would change is `mean_and_deviation`'s to say.
    """
    assert draws_per_seed
    return {name: np.mean([draws[name] for draws in draws_per_seed], axis=0) for name in draws_per_seed[0]}


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation over seeds, as of a sample (divided by their number less 1).

    One seed has no deviation: None. A figure without a value (None) in one of them has neither.
    """
    known = [value for value in values if value is not None]
    assert values
    if len(known) < len(values):
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None
