"""Nearest neighbours in feature space by cosine similarity, and their vote."""

import numpy as np
import torch

# n known patches, m asked about, of which q at a time, F features, R neighbours, K classes

_QUERIES, _KNOWN = 1024, 4096  # patches asked about, and known ones, at a time: so much of their similarities is in memory
_GRID = 2.0**24  # cosines are compared on this grid per unit: float32 represents its points from -1 to 1 exactly


@torch.no_grad()
def nearest(known_nF: np.ndarray, asked_mF: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` known patches with the largest cosine to each query patch, or all if there are fewer.

    Returns rows of known_nF, (m, R) int64, the nearest first, and their cosines, (m, R) float32. Of equals the lower row comes
    first. Cosines are computed in float64 and rounded to multiples of 2**-24, so that copies of a patch are equals wherever they
    stand. The cosine with features that are all 0 is 0.
    Raises ValueError for features that are not finite, and if there is no patch to search.
    """
    assert known_nF.ndim == asked_mF.ndim == 2 and known_nF.shape[1] == asked_mF.shape[1] and count > 0, count
    if not len(known_nF):
        raise ValueError("there are no patches to search: give at least one labelled patch")
    rows = np.empty((len(asked_mF), min(count, len(known_nF))), np.int64)
    cosine = np.empty(rows.shape, np.float32)
    for start in range(0, len(asked_mF), _QUERIES):
        asked_qF = _unit(asked_mF[start : start + _QUERIES])
        rows_qR = torch.empty((len(asked_qF), 0), dtype=torch.int64)
        cosine_qR = torch.empty((len(asked_qF), 0), dtype=torch.float32)
        for first in range(0, len(known_nF), _KNOWN):
            exact = asked_qF @ _unit(known_nF[first : first + _KNOWN]).T
            here = (exact.mul_(_GRID).round_() / _GRID).float()
            column = _largest(here, count)
            # Those before are of lower rows and stand in front, as a stable sort leaves them.
            rows_qR, cosine_qR = torch.cat([rows_qR, column + first], 1), torch.cat([cosine_qR, here.gather(1, column)], 1)
            order = cosine_qR.argsort(dim=1, descending=True, stable=True)[:, :count]
            rows_qR, cosine_qR = rows_qR.gather(1, order), cosine_qR.gather(1, order)
        rows[start : start + _QUERIES], cosine[start : start + _QUERIES] = rows_qR.numpy(), cosine_qR.numpy()
    return rows, cosine


def knn_probabilities(
    known_nF: np.ndarray,
    labels_n: np.ndarray,
    asked_mF: np.ndarray,
    *,
    classes: int,
    neighbours: int,
    temperature: float,
) -> np.ndarray:
    """(m, K) float64: each class's share of the votes of the nearest, which vote with exp(cosine / temperature).

    labels_n: from 0 to classes - 1; otherwise as in `nearest`.
    Source: Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4.
    """
    rows_mR, cosine_mR = nearest(known_nF, asked_mF, neighbours)
    # Less the nearest one's, which changes no share and keeps a low temperature from overflowing.
    votes_mR = np.exp((cosine_mR.astype(np.float64) - cosine_mR[:, :1]) / temperature)
    labels_mR = np.asarray(labels_n)[rows_mR]
    votes_mK = np.stack([(votes_mR * (labels_mR == label)).sum(1) for label in range(classes)], axis=1)
    return votes_mK / votes_mK.sum(1, keepdims=True)


def _unit(features: np.ndarray) -> torch.Tensor:
    unit = torch.tensor(np.asarray(features, np.float64))
    if not torch.isfinite(unit).all():
        raise ValueError("the features contain NaN or infinity: the backbone's training diverged, so use an earlier one")
    length = unit.norm(dim=1, keepdim=True)
    return unit / length.where(length > 0, 1.0)


def _largest(values_qn: torch.Tensor, count: int) -> torch.Tensor:
    """(q, count) the columns of each row's largest values, in the order of the columns; of equals the lower ones."""
    count = min(count, values_qn.shape[1])
    found_qR, column_qR = values_qn.topk(count)
    # topk takes whichever of equals it likes: where some were left out, a stable sort decides.
    tied_q = (values_qn >= found_qR[:, -1:]).sum(1) > count
    if tied_q.any():
        column_qR[tied_q] = values_qn[tied_q].argsort(dim=1, descending=True, stable=True)[:, :count]
    return column_qR.sort(dim=1).values
