"""The linear protocol's classifier: multinomial logistic regression, to convergence, on frozen features."""

from dataclasses import dataclass

import numpy as np
import torch

# Weight decays tried, from nearly none to strong; on standardised features they mean the same for every backbone.
DECAYS = tuple(10.0**exponent for exponent in range(-6, 2))


@dataclass(frozen=True)
class LogisticHead:
    """Standardise by the training features, then K linear scores: x -> ((x - mean) / std) @ weight + bias."""

    mean: np.ndarray  # (F,)
    std: np.ndarray  # (F,)
    weight: np.ndarray  # (F, K)
    bias: np.ndarray  # (K,)
    decay: float

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(n, F) features -> (n, K) float64 class probabilities."""
        scores = torch.from_numpy((features.astype(np.float64) - self.mean) / self.std @ self.weight + self.bias)
        return torch.softmax(scores, dim=1).numpy()


def fit_logistic(features: np.ndarray, labels: np.ndarray, *, classes: int, decay: float) -> LogisticHead:
    """Minimise mean cross-entropy + decay / 2 |weight|^2 by L-BFGS in float64. The bias has no decay.

    features: (n, F); labels: (n,) from 0 to classes - 1. The objective is convex, so there is no seed.
    """
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    std[std < 1e-12] = 1.0  # a constant feature says nothing, and must not divide by 0
    x = torch.from_numpy((features.astype(np.float64) - mean) / std)
    y = torch.from_numpy(labels.astype(np.int64))
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return LogisticHead(mean, std, weight.detach().numpy(), bias.detach().numpy(), decay)


def fit_with_validation(
    features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, *, classes: int
) -> tuple[LogisticHead, dict[float, float]]:
    """Choose the decay by the log loss of the held-out part, then fit all of the labels with it.

    held_out: (n,) bool, the validation part. Returns the head, and the validation's log loss for each decay tried. Without
    a validation part the strongest decay that was tried is not a choice: at least one patch must be held out.
    """
    assert held_out.any() and not held_out.all(), "both parts need patches"
    losses = {}
    for decay in DECAYS:
        head = fit_logistic(features[~held_out], labels[~held_out], classes=classes, decay=decay)
        chosen = head.probabilities(features[held_out])[np.arange(held_out.sum()), labels[held_out]]
        losses[decay] = float(-np.log(np.maximum(chosen, 1e-15)).mean())
    best = min(losses, key=lambda decay: losses[decay])
    return fit_logistic(features, labels, classes=classes, decay=best), losses
