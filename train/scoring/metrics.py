"""Classification metrics, all computed from stored predictions and never as an average over batches.

Shapes: n patches, K classes, B bins of confidence, D weightings of the patches. `score` uses one weighting, of 1 for each patch;
train/scoring/bootstrap.py uses one for each draw.
The formulas are here and in float64, so that a metric and its bootstrap draws agree to the last digits. torchmetrics divides in
single precision, puts a confidence of exactly 1 into a 16th bin, and rounds a matrix with a value above 1 after taking it for
logits. The tests compare the metrics with scikit-learn's, and with those of torchmetrics up to its precision.

To add a metric, add an entry to METRICS. Earlier evaluations show a dash for it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

BINS = 15  # of confidence, as in Guo et al. 2017


class Ranks(NamedTuple):
    """How one class ranks against the rest. positives, negatives: row numbers, the negatives by rising probability; below,
    not_above: for each positive, the number of negatives with a lower probability, and with a lower or equal one."""

    positives: np.ndarray
    negatives: np.ndarray
    below: np.ndarray
    not_above: np.ndarray


class Terms(NamedTuple):
    """What each patch adds to the sums that the metrics are computed from; arrays are (n,).

    label; guess: the class with the largest probability, the first of equals; loss: nats; bin: of confidence, 0 to BINS - 1;
    gap: 1 for a correct guess and 0 for a wrong one, minus the confidence; ranks: one for each class.
    """

    label: np.ndarray
    guess: np.ndarray
    loss: np.ndarray
    bin: np.ndarray
    gap: np.ndarray
    ranks: list[Ranks]


@dataclass(frozen=True)
class Sums:
    """Sums over the patches, for each of D weightings.

    confusion_KKD: counts, truth first, more than 0 in total; loss_D: nats; gap_BD: gaps in each bin of confidence; auroc_KD: of
    each class, NaN where it has none.
    """

    confusion_KKD: np.ndarray
    loss_D: np.ndarray
    gap_BD: np.ndarray
    auroc_KD: np.ndarray

    @functools.cached_property
    def count_D(self) -> np.ndarray:
        return self.confusion_KKD.sum((0, 1))

    @functools.cached_property
    def rates(self) -> dict[str, np.ndarray]:
        """precision, recall and f1 of each class, (K, D), NaN where undefined."""
        hits_KD = np.einsum("kkd->kd", self.confusion_KKD)
        support_KD, predicted_KD = self.confusion_KKD.sum(1), self.confusion_KKD.sum(0)
        return {
            "precision": _ratio(hits_KD, predicted_KD),
            "recall": _ratio(hits_KD, support_KD),
            "f1": _ratio(2 * hits_KD, support_KD + predicted_KD),
        }

    def macro(self, rate: str) -> np.ndarray:
        """(D,) mean of a rate over the classes that occur or are predicted, an undefined one counting 0."""
        return np.nansum(self.rates[rate], 0) / (~np.isnan(self.rates["f1"])).sum(0)


class Metric(NamedTuple):
    """title: as a column's head; compute: from sums to (D,) values, NaN where undefined; is_share: whether it lies in 0 to 1."""

    title: str
    compute: Callable[[Sums], np.ndarray]
    lower_is_better: bool = False
    is_share: bool = True


# In the order of a table's columns. See `score` for definitions.
METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", lambda sums: np.einsum("kkd->d", sums.confusion_KKD) / sums.count_D),
    "balanced_accuracy": Metric("balanced accuracy", lambda sums: _nanmean(sums.rates["recall"])),
    "precision": Metric("macro precision", lambda sums: sums.macro("precision")),
    "recall": Metric("macro recall", lambda sums: sums.macro("recall")),
    "f1": Metric("macro F1", lambda sums: sums.macro("f1")),
    "auroc": Metric("AUROC", lambda sums: _nanmean(sums.auroc_KD)),
    "log_loss": Metric("log loss", lambda sums: sums.loss_D / sums.count_D, lower_is_better=True, is_share=False),
    "calibration_error": Metric(
        "calibration error", lambda sums: np.abs(sums.gap_BD).sum(0) / sums.count_D, lower_is_better=True
    ),
}


def compute_metrics(sums: Sums) -> dict[str, np.ndarray]:
    """Each of METRICS, (D,), NaN where undefined (an AUROC where only one class occurs)."""
    return {name: metric.compute(sums) for name, metric in METRICS.items()}


def accuracies(guesses: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, and balanced_accuracy (mean recall over the classes that occur), of n > 0 predicted classes; both are (n,)."""
    right = guesses == labels
    recalls = [right[labels == label].mean() for label in np.unique(labels)]
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(np.mean(recalls))}


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The metrics of n predictions over K classes.

    probabilities: (n, K), 0 to 1, rows summing to 1; labels: (n,) from 0 to K - 1. The prediction is the class with the largest
    probability, the first of equals. A class occurs when it has a label. Returns METRICS, per_class and confusion:

    - accuracy
    - balanced_accuracy: mean recall over the classes that occur
    - precision, recall, f1: macro, the mean over the classes that occur or are predicted. An undefined value (the precision of a
      class that is never predicted, the recall of one that does not occur) counts 0: scikit-learn's average="macro" with
      zero_division=0. So recall is below balanced_accuracy when a class that does not occur is predicted, and equal otherwise
    - auroc: one against the rest, a tie counts half, the mean over the classes that occur; None where only one does
    - log_loss: nats; the probability of the true class is clipped to float64's epsilon (2.2e-16), as in scikit-learn
    - calibration_error: expected calibration error of the largest probability, in 15 bins of equal width that include their
      upper edge (Guo et al. 2017, "On calibration of modern neural networks", equation 3)
    - per_class: K of {precision, recall, f1, auroc, support}, None where undefined: the precision of a class that is never
      predicted, the recall and AUROC of one that does not occur, the F1 where both hold, the AUROC where no other class occurs.
      support is the number of labels
    - confusion: K x K counts, rows are the truth

    Raises ValueError when a probability is not finite.
    """
    terms = terms_of(probabilities, labels)
    classes = probabilities.shape[1]
    confusion_KK = np.bincount(terms.label * classes + terms.guess, minlength=classes**2).reshape(classes, classes)
    gap_B = np.bincount(terms.bin, weights=terms.gap, minlength=BINS)
    auroc_KD = np.stack([auroc(ranks, np.ones((len(labels), 1))) for ranks in terms.ranks])
    sums = Sums(confusion_KK[..., None], terms.loss.sum(keepdims=True), gap_B[:, None], auroc_KD)
    columns = {name: column_KD[:, 0] for name, column_KD in (sums.rates | {"auroc": auroc_KD}).items()}
    per_class = [{name: _plain(column[k]) for name, column in columns.items()} for k in range(classes)]
    return {
        **{name: _plain(value_D[0]) for name, value_D in compute_metrics(sums).items()},
        "per_class": [row | {"support": int(count)} for row, count in zip(per_class, confusion_KK.sum(1), strict=True)],
        "confusion": confusion_KK.tolist(),
    }


def terms_of(probabilities: np.ndarray, labels: np.ndarray) -> Terms:
    """See `score` for arguments and exceptions, `Terms` for the result."""
    p, y = np.asarray(probabilities, np.float64), np.ascontiguousarray(labels, np.int64)
    assert p.ndim == 2 and len(p) == len(y) > 0, (p.shape, y.shape)
    assert y.min() >= 0 and y.max() < p.shape[1], (y.min(), y.max(), p.shape)
    if not np.isfinite(p).all():
        raise ValueError("the model's predictions contain NaN or infinity: its training diverged, so try a lower --learning-rate")
    guess, confidence, every = p.argmax(1), p.max(1), np.arange(len(p))
    epsilon = np.finfo(np.float64).eps
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    return Terms(
        label=y,
        guess=guess,
        loss=-np.log(np.clip(p[every, y], epsilon, 1 - epsilon)),
        bin=np.searchsorted(edges, confidence),
        gap=(guess == y) - confidence,
        ranks=[_ranks(p[:, k], y == k) for k in range(p.shape[1])],
    )


def _ranks(p_n, positive_n):
    positives, negatives = np.flatnonzero(positive_n), np.flatnonzero(~positive_n)
    negatives = negatives[np.argsort(p_n[negatives], kind="stable")]
    below, not_above = (np.searchsorted(p_n[negatives], p_n[positives], side) for side in ("left", "right"))
    return Ranks(positives, negatives, below, not_above)


def auroc(ranks: Ranks, weight_nD: np.ndarray) -> np.ndarray:
    """(D,) AUROC of a class against the rest, NaN where one side has no weight.

    It is the share of pairs of a positive and a negative in which the positive has the larger probability, a tie counting half
    (Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve").
    """
    weight_PD = weight_nD[ranks.positives]
    before_ND = np.zeros((len(ranks.negatives) + 1, weight_nD.shape[1]))  # weight of the first N negatives
    np.cumsum(weight_nD[ranks.negatives], axis=0, out=before_ND[1:])
    won_D = np.einsum("pd,pd->d", weight_PD, before_ND[ranks.below]) / 2
    won_D += np.einsum("pd,pd->d", weight_PD, before_ND[ranks.not_above]) / 2
    return _ratio(won_D, weight_PD.sum(0) * before_ND[-1])


def _nanmean(values_KD):
    return _ratio(np.nansum(values_KD, 0), (~np.isnan(values_KD)).sum(0))


def _ratio(part, whole):
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _plain(value):
    return None if np.isnan(value) else float(value)
