"""The logistic regression of the linear protocol against scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from train.scoring.logistic import DECAYS, fit_logistic, fit_path, fit_with_validation


def some_features(seed, n=240, width=12, classes=3, *, shift=0.8):
    """Features of unequal scale and offset, one of them constant, that know something of the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = rng.normal(size=(n, width)) + shift * rng.normal(size=(classes, width))[labels]
    features = features * np.logspace(-2, 2, width) + np.linspace(-50, 50, width)
    features[:, 3] = 7.0
    return features.astype(np.float32), labels


def objective(features, labels, head, decay):
    """Mean cross-entropy + decay / 2 |weight|^2."""
    chosen = head.probabilities(features)[np.arange(len(labels)), labels]
    return -np.log(chosen).mean() + decay / 2 * (head.weight**2).sum()


@pytest.mark.parametrize(("n", "width", "classes"), [(240, 12, 4), (240, 12, 2), (40, 90, 3)])
@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_reaches_scikit_learns_objective(n, width, classes, decay):
    """With more patches than features, and with fewer."""
    features, labels = some_features(classes, n=n, width=width, classes=classes)
    head = fit_logistic(features, labels, classes=classes, decay=decay)
    std = np.where(features.std(0, dtype=np.float64) < 1e-12, 1, features.std(0, dtype=np.float64))
    x = (features - features.mean(0, dtype=np.float64)) / std
    theirs = LogisticRegression(C=1 / (len(labels) * decay), tol=1e-10, max_iter=20_000)
    if classes == 2:  # theirs has one score for two classes, ours two; with decay those are w/2 and -w/2
        theirs = LogisticRegression(C=2 / (len(labels) * decay), tol=1e-10, max_iter=20_000)
    theirs.fit(x, labels)
    p = theirs.predict_proba(x)
    weight = theirs.coef_ if classes > 2 else np.concatenate([-theirs.coef_, theirs.coef_]) / 2
    wanted = -np.log(p[np.arange(len(labels)), labels]).mean() + decay / 2 * (weight**2).sum()
    assert objective(features, labels, head, decay) == pytest.approx(wanted, abs=1e-5)
    np.testing.assert_allclose(head.probabilities(features), p, atol=2e-3)


@pytest.mark.parametrize("decay", DECAYS)
def test_is_at_a_minimum(decay):
    """No gradient is left, also where the classes can be told apart without error."""
    features, labels = some_features(1, n=40, width=15, shift=2.0)
    head = fit_logistic(features, labels, classes=3, decay=decay)
    residual = (head.probabilities(features) - np.eye(3)[labels]) / len(labels)
    x = (features - head.mean) / head.std
    assert np.abs(x.T @ residual + decay * head.weight).max() < 1e-4
    assert np.abs(residual.sum(0)).max() < 1e-4  # the bias has no decay


def test_path_is_the_fit_of_each_decay():
    features, labels = some_features(9, n=100, width=6)
    for order in ((1e-3, 1e-1, 10.0), (1.0, 1e-2)):
        heads = fit_path(features, labels, classes=3, decays=order)
        assert tuple(head.decay for head in heads) == order
        for head in heads:
            alone = fit_logistic(features, labels, classes=3, decay=head.decay)
            np.testing.assert_allclose(head.probabilities(features), alone.probabilities(features), atol=1e-4)


def test_features_that_say_nothing_leave_the_frequencies():
    labels = np.array([0, 0, 0, 1])
    head = fit_logistic(np.full((4, 6), 3.0, np.float32), labels, classes=2, decay=1e-2)
    np.testing.assert_allclose(head.probabilities(np.full((1, 6), 3.0)), [[0.75, 0.25]], atol=1e-4)


def test_scale_and_offset_of_features_do_not_matter():
    features, labels = some_features(3)
    stretched = features.astype(np.float64) * np.logspace(-3, 3, 12) + 5
    one, two = (fit_logistic(f, labels, classes=3, decay=1e-2).probabilities(f) for f in (features, stretched))
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_constant_feature_and_absent_class_do_no_harm():
    features, labels = some_features(4, n=60, width=5)
    head = fit_logistic(features, labels, classes=5, decay=1e-2)
    p = head.probabilities(features)
    assert np.isfinite(p).all() and p.shape == (len(labels), 5)
    np.testing.assert_allclose(p.sum(1), 1)
    assert p[:, 3:].max() < 0.05


def test_probabilities_standardise_by_the_training_features():
    features, labels = some_features(5)
    head = fit_logistic(features, labels, classes=3, decay=1e-2)
    np.testing.assert_allclose(head.probabilities(features[:1]), head.probabilities(features)[:1], atol=1e-12)


@pytest.mark.parametrize(("shift", "weakest", "strongest"), [(0.0, 1.0, 10.0), (0.5, 1e-4, 0.1)])
def test_chosen_decay_is_the_best_on_the_validation_part(shift, weakest, strongest):
    """Strong where there is nothing to learn, weaker where there is something."""
    features, labels = some_features(7, n=90, width=8, shift=shift)
    held_out = np.random.default_rng(0).random(90) < 0.3
    parts = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out), "used": np.arange(90)}
    head, losses = fit_with_validation(features, labels, **parts, classes=3)
    assert tuple(losses) == DECAYS
    wanted = {}
    for decay in DECAYS:
        p = fit_logistic(features[~held_out], labels[~held_out], classes=3, decay=decay).probabilities(features[held_out])
        wanted[decay] = -np.log(p[np.arange(held_out.sum()), labels[held_out]]).mean()
    assert losses == pytest.approx(wanted, rel=1e-3)
    assert head.decay == min(wanted, key=wanted.get)
    assert weakest <= head.decay <= strongest
    refitted = fit_logistic(features, labels, classes=3, decay=head.decay)  # on all of the labels, validation part included
    np.testing.assert_array_equal(head.weight, refitted.weight)


@pytest.mark.parametrize("empty", ["train", "validation", "used"])
def test_all_parts_need_patches(empty):
    features, labels = some_features(8)
    parts = dict.fromkeys(("train", "validation", "used"), np.arange(4)) | {empty: np.arange(0)}
    with pytest.raises(AssertionError, match="all parts"):
        fit_with_validation(features, labels, **parts, classes=3)
