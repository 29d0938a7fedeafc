"""Figures of a classification, all from the kept predictions: never an average over batches.

Shapes: n patches, K classes, B bins of confidence, D weightings of the patches: one, with 1 for each patch, in `score`; in
train/scoring/bootstrap.py as many as there are draws.
The counts are torchmetrics'; the formulas are here and in float64, so that a figure and the draws around it are the same to the
last digits. torchmetrics divides in single precision, puts a confidence of exactly 1 into a 16th bin, and takes a matrix with a
value above 1, by rounding, for logits. The tests hold the figures to scikit-learn's, and to its own as far as that goes.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

# The figures in the order of a table, with what a person reads above the column.
TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "precision": "macro precision",
    "recall": "macro recall",
    "f1": "macro F1",
    "auroc": "AUROC",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
}
LOWER_IS_BETTER = frozenset({"log_loss", "calibration_error"})

BINS = 15  # of confidence, as in Guo et al. 2017


class Ranks(NamedTuple):
    """How one class is ranked against the rest. positives, negatives: their row numbers, the negatives by rising probability;
    below, not_above: for each positive, the negatives of less probability, and of less or the same."""

    positives: np.ndarray
    negatives: np.ndarray
    below: np.ndarray
    not_above: np.ndarray


class Terms(NamedTuple):
    """What each patch adds to the sums that the figures are made of; arrays are (n,).

    label; guess: the class of the largest probability, the first of equals; loss: nats; bin: of confidence, 0 to BINS - 1;
    gap: 1 where the guess is right or else 0, less the confidence; ranks: for each class.
    """

    label: np.ndarray
    guess: np.ndarray
    loss: np.ndarray
    bin: np.ndarray
    gap: np.ndarray
    ranks: list[Ranks]


def accuracies(guesses: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, and balanced_accuracy (mean recall over the classes that occur), of n > 0 guessed classes: (n,) each."""
    right = guesses == labels
    recalls = [right[labels == label].mean() for label in np.unique(labels)]
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(np.mean(recalls))}


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Figures of n predictions over K classes.

    probabilities: (n, K), 0 to 1, rows summing to 1; labels: (n,) from 0 to K - 1. The prediction is the largest probability,
    the first of equals. A class occurs when a label is of it. Returns those of TITLES, and two more:

    - accuracy
    - balanced_accuracy: mean recall over the classes that occur
    - precision, recall, f1: macro, the mean over the classes that occur or are predicted, in which a class without a value (a
      precision where it is never predicted, a recall where it does not occur) counts 0: scikit-learn's average="macro" with
      zero_division=0. So recall lies below balanced_accuracy when a class that does not occur is predicted, and is the same
      otherwise
    - auroc: one against the rest, a tie counts half, the mean over the classes that occur; None where only one does
    - log_loss: nats; the probability of the true class is clipped to float64's epsilon (2.2e-16), as in scikit-learn
    - calibration_error: expected, of the largest probability, in 15 bins of equal width that hold their upper edge (Guo et al.
      2017, "On calibration of modern neural networks", equation 3)
    - per_class: K of {precision, recall, f1, auroc, support}, None where there is no value: a precision where the class is
      never predicted, a recall and an AUROC where it does not occur, an F1 where neither, an AUROC where nothing else occurs.
      support is its number of labels
    - confusion: K x K counts, rows are the truth

    Raises ValueError when a probability is not a number.
    """
    terms = terms_of(probabilities, labels)
    classes = probabilities.shape[1]
    guess, truth = torch.from_numpy(terms.guess), torch.from_numpy(terms.label)
    confusion_KK = multiclass_confusion_matrix(guess, truth, classes).numpy()
    gap_B = np.bincount(terms.bin, weights=terms.gap, minlength=BINS)
    auroc_KD = np.stack([auroc(ranks, np.ones((len(labels), 1))) for ranks in terms.ranks])
    values = figures(confusion_KK[..., None], terms.loss.sum(keepdims=True), gap_B[:, None], auroc_KD)
    columns = {name: column_KD[:, 0] for name, column_KD in (rates(confusion_KK[..., None]) | {"auroc": auroc_KD}).items()}
    per_class = [{name: _plain(column[k]) for name, column in columns.items()} for k in range(classes)]
    return {
        **{name: _plain(value_D[0]) for name, value_D in values.items()},
        "per_class": [row | {"support": int(count)} for row, count in zip(per_class, confusion_KK.sum(1), strict=True)],
        "confusion": confusion_KK.tolist(),
    }


def terms_of(probabilities: np.ndarray, labels: np.ndarray) -> Terms:
    """See `score` for what is given, what each is, and what is raised."""
    p, y = np.asarray(probabilities, np.float64), np.ascontiguousarray(labels, np.int64)
    assert p.ndim == 2 and len(p) == len(y) > 0, (p.shape, y.shape)
    assert y.min() >= 0 and y.max() < p.shape[1], (y.min(), y.max(), p.shape)
    if not np.isfinite(p).all():
        raise ValueError("the model's predictions are not numbers: its training went astray, so try a lower --learning-rate")
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
    """(D,) of a class against the rest, NaN where there is no weight on either side.

    The share of pairs of a positive and a negative in which the positive has the larger probability, a tie counting half: the
    area under the curve (Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve").
    """
    weight_PD = weight_nD[ranks.positives]
    before_ND = np.zeros((len(ranks.negatives) + 1, weight_nD.shape[1]))  # weight of the first N negatives
    np.cumsum(weight_nD[ranks.negatives], axis=0, out=before_ND[1:])
    won_D = np.einsum("pd,pd->d", weight_PD, before_ND[ranks.below]) / 2
    won_D += np.einsum("pd,pd->d", weight_PD, before_ND[ranks.not_above]) / 2
    return _ratio(won_D, weight_PD.sum(0) * before_ND[-1])


def rates(confusion_KKD: np.ndarray) -> dict[str, np.ndarray]:
    """precision, recall and f1 of each class, (K, D), NaN where there is none. confusion_KKD: counts, truth first."""
    hits_KD, support_KD, predicted_KD = np.einsum("kkd->kd", confusion_KKD), confusion_KKD.sum(1), confusion_KKD.sum(0)
    return {
        "precision": _ratio(hits_KD, predicted_KD),
        "recall": _ratio(hits_KD, support_KD),
        "f1": _ratio(2 * hits_KD, support_KD + predicted_KD),
    }


def figures(confusion_KKD: np.ndarray, loss_D: np.ndarray, gap_BD: np.ndarray, auroc_KD: np.ndarray) -> dict[str, np.ndarray]:
    """Those of TITLES, (D,) each, NaN for an AUROC where only one class occurs. See `score` for what each is.

    confusion_KKD: counts, truth first, above 0 in sum; loss_D: sums of nats; gap_BD: sums of gaps in each bin; auroc_KD: NaN
    where there is none.
    """
    count_D = confusion_KKD.sum((0, 1))
    of = rates(confusion_KKD)
    takes_part_D = (~np.isnan(of["f1"])).sum(0)
    return {
        "accuracy": np.einsum("kkd->d", confusion_KKD) / count_D,
        "balanced_accuracy": _mean_of_known(of["recall"]),
        **{name: np.nansum(rate_KD, 0) / takes_part_D for name, rate_KD in of.items()},
        "auroc": _mean_of_known(auroc_KD),
        "log_loss": loss_D / count_D,
        "calibration_error": np.abs(gap_BD).sum(0) / count_D,
    }


def _mean_of_known(values_KD):
    return _ratio(np.nansum(values_KD, 0), (~np.isnan(values_KD)).sum(0))


def _ratio(part, whole):
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _plain(value):
    return None if np.isnan(value) else float(value)
