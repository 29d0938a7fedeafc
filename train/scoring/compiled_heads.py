"""Linear classifiers trained by SGD or Adam on the CPU, as compiled loops.

With a few classes, most time goes into reading the features and into a framework's overhead in thousands of small steps.
These loops read the features row by row, once per epoch, and need no framework: 5.9 times as fast as a plain torch loop
(benchmarks/results/2026-11-23-heads.md).
"""

from typing import NamedTuple

import numpy as np
from numba import njit

# N rows of the feature matrix, F features, K classes

MOMENTUM = 0.9  # of sgd
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of adam: torch.optim's defaults
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order, so that they are vectorised; NaN stays NaN


class Layer(NamedTuple):
    """x -> x @ weight.T + bias. weight: (outputs, inputs); bias: (outputs,)."""

    weight: np.ndarray
    bias: np.ndarray


# Four rows at a time, so that what is read of the weights and of their slopes serves four; the last row stands in for those that
# are not there. The loops over the features are simple ones, which LLVM vectorises.


@njit(cache=True, nogil=True, fastmath=_REORDERED)
def _four(features_NF, rows, start, stop):
    b, c, d = min(start + 1, stop - 1), min(start + 2, stop - 1), min(start + 3, stop - 1)
    return features_NF[rows[start]], features_NF[rows[b]], features_NF[rows[c]], features_NF[rows[d]]


@njit(cache=True, nogil=True, fastmath=_REORDERED)
def _scores(four, layer, scores_4K):
    a, b, c, d = four
    for k in range(len(layer.bias)):
        weight = layer.weight[k]
        score_a = score_b = score_c = score_d = layer.bias[k]
        for f in range(len(weight)):
            score_a += weight[f] * a[f]
            score_b += weight[f] * b[f]
            score_c += weight[f] * c[f]
            score_d += weight[f] * d[f]
        scores_4K[0, k], scores_4K[1, k], scores_4K[2, k], scores_4K[3, k] = score_a, score_b, score_c, score_d


@njit(cache=True, nogil=True, fastmath=_REORDERED)
def _errors(scores_K, label):
    """The loss of a row. Its scores become the loss's derivatives by them: softmax less one-hot."""
    highest = scores_K.max()
    chosen = scores_K[label] - highest
    for k in range(len(scores_K)):
        scores_K[k] = np.exp(scores_K[k] - highest)
    total = scores_K.sum()
    for k in range(len(scores_K)):
        scores_K[k] /= total
    scores_K[label] -= 1
    return np.float64(np.log(total) - chosen)


@njit(cache=True, nogil=True, fastmath=_REORDERED)
def linear_loss(features_NF, labels_N, rows, layer):
    scores_4K, total = np.empty((4, len(layer.bias)), layer.bias.dtype), 0.0
    for start in range(0, len(rows), 4):
        _scores(_four(features_NF, rows, start, len(rows)), layer, scores_4K)
        for i in range(min(4, len(rows) - start)):
            total += _errors(scores_4K[i], labels_N[rows[start + i]])
    return total / len(rows)


@njit(cache=True, nogil=True, fastmath=_REORDERED)
def _slopes(four, errors_4K, slope):
    """Adds what four rows contribute to the loss's derivatives by the layer's parameters, as a sum over the rows."""
    a, b, c, d = four
    for k in range(len(slope.bias)):
        weight = slope.weight[k]
        error_a, error_b, error_c, error_d = errors_4K[0, k], errors_4K[1, k], errors_4K[2, k], errors_4K[3, k]
        for f in range(len(weight)):
            weight[f] += error_a * a[f] + error_b * b[f] + error_c * c[f] + error_d * d[f]
        slope.bias[k] += error_a + error_b + error_c + error_d


@njit(cache=True, nogil=True, fastmath=_REORDERED)
def linear_epoch(features_NF, labels_N, order, layer, slope, first, second, steps, adam, batch_size, rate, decay):
    """Steps over the rows in that order; changes layer, slope, first and second (the optimiser's moments). Returns the mean loss.

    steps: taken before.
    """
    errors_4K, total = np.empty((4, len(layer.bias)), layer.bias.dtype), 0.0
    for start in range(0, len(order), batch_size):
        stop = min(start + batch_size, len(order))
        slope.weight[:] = 0
        slope.bias[:] = 0
        for i in range(start, stop, 4):
            four = _four(features_NF, order, i, stop)
            _scores(four, layer, errors_4K)
            for j in range(4):
                if i + j < stop:
                    total += _errors(errors_4K[j], labels_N[order[i + j]])
                else:
                    errors_4K[j] = 0
            _slopes(four, errors_4K, slope)
        steps += 1
        share = 1 / (stop - start)
        if adam:
            _adam(
                layer.weight.ravel(), slope.weight.ravel(), first.weight.ravel(), second.weight.ravel(), share, decay, rate, steps
            )
            _adam(layer.bias, slope.bias, first.bias, second.bias, share, 0.0, rate, steps)
        else:
            _sgd(layer.weight.ravel(), slope.weight.ravel(), first.weight.ravel(), share, decay, rate)
            _sgd(layer.bias, slope.bias, first.bias, share, 0.0, rate)
    return total / len(order)


@njit(cache=True, nogil=True, fastmath=_REORDERED)
def _adam(w, slope, first, second, share, decay, rate, steps):
    """Kingma and Ba 2015, algorithm 1, in the arithmetic of torch.optim.Adam. slope: a sum, of which share makes the mean."""
    number = w.dtype.type  # of the weights: a float64 would make float64 of all that it meets
    share_, decay_, epsilon = number(share), number(decay), number(EPSILON)
    rest_1, rest_2 = number(1 - BETAS[0]), number(1 - BETAS[1])
    rate_, scale = number(rate / (1 - BETAS[0] ** steps)), number(1 / np.sqrt(1 - BETAS[1] ** steps))
    for i in range(len(w)):
        g = slope[i] * share_ + decay_ * w[i]
        first[i] += (g - first[i]) * rest_1
        second[i] += (g * g - second[i]) * rest_2
        w[i] -= rate_ * first[i] / (np.sqrt(second[i]) * scale + epsilon)


@njit(cache=True, nogil=True, fastmath=_REORDERED)
def _sgd(w, slope, velocity, share, decay, rate):
    number = w.dtype.type
    share_, decay_, rate_, momentum = number(share), number(decay), number(rate), number(MOMENTUM)
    for i in range(len(w)):
        velocity[i] = momentum * velocity[i] + slope[i] * share_ + decay_ * w[i]
        w[i] -= rate_ * velocity[i]
