"""Figures of a classification, all from the kept predictions: never an average over batches."""

import numpy as np
import torch
from torchmetrics.functional.classification import (
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

# The figures in the order of a table, with what a person reads above the column.
TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "macro F1",
    "auroc": "AUROC",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
}


def accuracies(guesses: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, and balanced_accuracy (mean recall over the classes that occur), of n > 0 guessed classes: (n,) each."""
    right = guesses == labels
    recalls = [right[labels == label].mean() for label in np.unique(labels)]
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(np.mean(recalls))}


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float | list]:
    """Figures of n predictions over K classes.

    probabilities: (n, K), rows summing to 1; labels: (n,) from 0 to K - 1; the prediction is the largest probability, the
    first of equals. Returns accuracy; balanced_accuracy (mean recall over the classes that occur); f1 (macro, over the
    classes that occur or are predicted); auroc (one against the rest, mean over the classes that occur; None where only
    one does); log_loss (nats); calibration_error (expected, 15 bins); recall (per class, None where it does not occur);
    confusion (K x K counts, rows are the truth).
    """
    assert probabilities.ndim == 2 and len(probabilities) == len(labels) > 0, (probabilities.shape, labels.shape)
    p, y = torch.from_numpy(np.ascontiguousarray(probabilities, np.float64)), torch.from_numpy(labels.astype(np.int64))
    classes = p.shape[1]
    confusion = multiclass_confusion_matrix(p.argmax(1), y, classes).numpy()
    support = confusion.sum(1)
    occurs = support > 0
    recall = np.divide(confusion.diagonal(), support, out=np.zeros(classes), where=occurs)
    auroc = None
    if occurs.sum() > 1:
        per_class = multiclass_auroc(p, y, classes, average="none").numpy()
        auroc = float(per_class[occurs].mean())
    return {
        "accuracy": float(confusion.diagonal().sum() / support.sum()),
        "balanced_accuracy": float(recall[occurs].mean()),
        "f1": float(multiclass_f1_score(p.argmax(1), y, classes, average="macro")),
        "auroc": auroc,
        "log_loss": float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-15)).mean()),
        "calibration_error": float(multiclass_calibration_error(p, y, classes, n_bins=15)),
        "recall": [float(r) if there else None for r, there in zip(recall, occurs, strict=True)],
        "confusion": confusion.tolist(),
    }
