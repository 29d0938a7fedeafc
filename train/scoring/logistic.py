"""The linear protocol's classifier: multinomial logistic regression, to convergence, on frozen features."""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax

# Weight decays tried, from nearly none to strong; on standardised features they mean the same for every backbone.
DECAYS = tuple(10.0**exponent for exponent in range(-5, 2))


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
        return softmax((features.astype(np.float64) - self.mean) / self.std @ self.weight + self.bias, axis=1)


def fit_logistic(features: np.ndarray, labels: np.ndarray, *, classes: int, decay: float) -> LogisticHead:
    """The head for one decay; see `fit_path`."""
    return fit_path(features, labels, classes=classes, decays=(decay,))[0]


def fit_path(features: np.ndarray, labels: np.ndarray, *, classes: int, decays: tuple[float, ...]) -> list[LogisticHead]:
    """For each decay, minimise mean cross-entropy + decay / 2 |weight|^2 by L-BFGS in float64. The bias has no decay.

    features: (n, F); labels: (n,) from 0 to classes - 1. The objective is convex, so there is no seed. Returns a head per
    decay, in their order.
    """
    from scipy.optimize import minimize  # takes 0.7 s to import, and most commands fit nothing

    n, mean, std = len(features), features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    std[std < 1e-12] = 1.0  # a constant feature says nothing, and must not divide by 0
    z_nR, basis_FR, variance_R = principal((features.astype(np.float64) - mean) / std)
    target_nK = np.eye(classes)[labels]
    heads: dict[float, LogisticHead] = {}
    weight_RK, bias_K = np.zeros((z_nR.shape[1], classes)), np.zeros(classes)
    for decay in sorted(decays, reverse=True):  # each starts from the stronger one's optimum
        # In units of this scale the objective curves alike in all directions, and L-BFGS needs tens of steps, not thousands.
        scale_R1 = 1 / np.sqrt(variance_R / 4 + decay)[:, None]

        def objective(x, scale_R1=scale_R1, decay=decay):
            x_RK = x.reshape(-1, classes)
            w_RK, b_K = x_RK[:-1] * scale_R1, x_RK[-1]
            log_p_nK = log_softmax(z_nR @ w_RK + b_K, axis=1)
            error_nK = (np.exp(log_p_nK) - target_nK) / n
            value = -(log_p_nK * target_nK).sum() / n + decay / 2 * np.square(w_RK).sum()
            return value, np.vstack([(z_nR.T @ error_nK + decay * w_RK) * scale_R1, error_nK.sum(0)]).ravel()

        start = np.vstack([weight_RK / scale_R1, bias_K]).ravel()
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "gtol": 1e-7, "ftol": 0.0})
        x_RK = found.x.reshape(-1, classes)
        weight_RK, bias_K = x_RK[:-1] * scale_R1, x_RK[-1]
        heads[decay] = LogisticHead(mean, std, basis_FR @ weight_RK, bias_K, decay)
    return [heads[decay] for decay in decays]


def principal(x_nF: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The principal components of (n, F) features of mean 0: scores (n, R), basis (F, R), variances (R,), all above 0.

    The best weights lie in their span, so nothing is lost, and few patches make a small problem.
    """
    n, features = x_nF.shape
    if n < features:
        variance, scores = np.linalg.eigh(x_nF @ x_nF.T / n)
        keep = variance > variance.max() * 1e-12
        variance, scores_nR = variance[keep], scores[:, keep] * np.sqrt(n * variance[keep])
        return scores_nR, x_nF.T @ (scores_nR / (n * variance)), variance
    variance, basis = np.linalg.eigh(x_nF.T @ x_nF / n)
    keep = variance > variance.max() * 1e-12
    return x_nF @ basis[:, keep], basis[:, keep], variance[keep]


def fit_with_validation(
    features: np.ndarray, labels: np.ndarray, *, train: np.ndarray, validation: np.ndarray, used: np.ndarray, classes: int
) -> tuple[LogisticHead, dict[float, float]]:
    """Choose the decay by the log loss of the validation part, then fit all of the labels with it.

    features: (N, F); labels: (N,); train, validation: rows to choose the decay with; used: rows to fit in the end.
    Returns the head, and the validation's log loss for each decay tried.
    """
    assert len(train) and len(validation) and len(used), "all parts need patches"
    losses = {}
    for head in fit_path(features[train], labels[train], classes=classes, decays=DECAYS):
        chosen = head.probabilities(features[validation])[np.arange(len(validation)), labels[validation]]
        losses[head.decay] = float(-np.log(np.maximum(chosen, 1e-15)).mean())
    best = min(losses, key=lambda decay: losses[decay])
    return fit_logistic(features[used], labels[used], classes=classes, decay=best), losses
