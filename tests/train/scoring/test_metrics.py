"""Figures of a classification against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from train.scoring.metrics import METRICS, accuracies, score

# Both libraries warn where a class does not occur, or is never predicted.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def probabilities_of(scores) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def some_predictions(seed, n, classes, *, skill=1.5):
    """Probabilities that know something of the labels, and labels of unequal frequency."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    scores = rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels]
    return probabilities_of(scores), labels


@st.composite
def coarse_predictions(draw, most=30):
    """Few patches, so that classes are absent or never predicted, and few values, so that there are ties, zeros and ones."""
    n, classes = draw(st.integers(1, most)), draw(st.integers(2, 5))
    parts = np.array(draw(st.lists(st.integers(0, 3), min_size=n * classes, max_size=n * classes))).reshape(n, classes)
    parts[parts.sum(1) == 0, draw(st.integers(0, classes - 1))] = 1
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return parts / parts.sum(1, keepdims=True), np.array(labels)


def by_scikit_learn(p, y) -> dict:
    """The same figures by scikit-learn alone, NaN in the place of None."""
    every, guess, nan = range(p.shape[1]), p.argmax(1), float("nan")
    each = sk.precision_recall_fscore_support(y, guess, labels=every, average=None, zero_division=nan)
    two_sides = [0 < (y == k).sum() < len(y) for k in every]
    auroc = [sk.roc_auc_score(y == k, p[:, k]) if defined else nan for k, defined in zip(every, two_sides, strict=True)]
    macro = sk.precision_recall_fscore_support(y, guess, average="macro", zero_division=0)
    return {
        "accuracy": sk.accuracy_score(y, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(y, guess),
        **dict(zip(("precision", "recall", "f1"), macro[:3], strict=True)),
        "auroc": np.mean([a for a, defined in zip(auroc, two_sides, strict=True) if defined]) if any(two_sides) else nan,
        "log_loss": sk.log_loss(y, p, labels=every),
        "calibration_error": calibration_error(p, y),
        "per_class": np.stack([*each[:3], auroc, each[3]], axis=1),
        "confusion": sk.confusion_matrix(y, guess, labels=every),
    }


def calibration_error(p, y):
    """scikit-learn's curve has the means of the bins, but not how many are in each."""
    confidence = p.max(1)
    true, predicted = calibration_curve((p.argmax(1) == y).astype(int), confidence, n_bins=15, pos_label=1)
    counts = np.array([sum(b / 15 < c <= (b + 1) / 15 for c in confidence) for b in range(15)])
    return (abs(true - predicted) * counts[counts > 0]).sum() / counts.sum()


def assert_same(found, wanted, *, tolerance=1e-6):
    near = dict(abs=tolerance, rel=0, nan_ok=True)
    assert [plain(found[name]) for name in METRICS] == pytest.approx([wanted[name] for name in METRICS], **near)
    rows = [[plain(row[name]) for name in ("precision", "recall", "f1", "auroc", "support")] for row in found["per_class"]]
    assert np.array(rows) == pytest.approx(np.array(wanted["per_class"]), **near)
    assert found["confusion"] == np.asarray(wanted["confusion"]).tolist()


def plain(value):
    return float("nan") if value is None else value


@pytest.mark.parametrize(("n", "classes"), [(300, 2), (400, 3), (150, 7), (12, 9), (5000, 4)])
@pytest.mark.parametrize("skill", [0.0, 1.5, 5.0])
def test_against_scikit_learn(n, classes, skill):
    p, y = some_predictions(classes, n, classes, skill=skill)
    assert_same(score(p, y), by_scikit_learn(p, y))


def test_means_over_classes_that_all_occur_are_scikit_learns_own():
    p, y = some_predictions(1, 400, 3)
    found = score(p, y)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr", average="macro"), abs=1e-6)
    p, y = some_predictions(1, 400, 2)
    assert score(p, y)["auroc"] == pytest.approx(sk.roc_auc_score(y, p[:, 1]), abs=1e-6)
    # The figures are of unequal things: one in another's place would be seen, but for recall, which is balanced_accuracy here.
    assert len({round(found[name], 6) for name in METRICS}) == len(METRICS) - 1
    assert found["recall"] == pytest.approx(found["balanced_accuracy"], abs=1e-12)


@given(coarse_predictions())
@settings(deadline=None, max_examples=60)
def test_against_scikit_learn_with_ties_absent_classes_zeros_and_ones(drawn):
    assert_same(score(*drawn), by_scikit_learn(*drawn))


def test_against_torchmetrics():
    """As far as single precision goes. No confidence is 1, which it has in a bin of its own."""
    p, y = some_predictions(3, 300, 4)
    p, y = p[y != 2], y[y != 2]  # predicted, though it does not occur
    found, (probabilities, labels) = score(p, y), (torch.from_numpy(p), torch.from_numpy(y))
    for name, function in (
        ("accuracy", lambda *given: tm.multiclass_accuracy(*given, average="micro")),
        ("precision", tm.multiclass_precision),
        ("recall", tm.multiclass_recall),
        ("f1", tm.multiclass_f1_score),
        ("calibration_error", tm.multiclass_calibration_error),
    ):
        assert found[name] == pytest.approx(float(function(probabilities, labels, 4)), abs=1e-5), name
    each = tm.multiclass_auroc(probabilities, labels, 4, average="none")
    assert [row["auroc"] for row in found["per_class"] if row["support"]] == pytest.approx(each[[0, 1, 3]].tolist(), abs=1e-5)


@given(coarse_predictions(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_order_of_the_patches_does_not_matter(drawn, random):
    p, y = drawn
    order = random.sample(range(len(y)), len(y))
    found = score(p, y)
    per_class = [[row[name] for name in ("precision", "recall", "f1", "auroc", "support")] for row in found["per_class"]]
    wanted = {**found, "per_class": np.array(per_class, float), **{name: plain(found[name]) for name in METRICS}}
    assert_same(score(p[order], y[order]), wanted, tolerance=1e-12)


@given(coarse_predictions(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_another_order_of_the_classes_only_permutes_per_class(drawn, random):
    p, y = drawn
    p = p + np.linspace(0, 1e-6, p.shape[1])  # between equal probabilities the order decides, so there are none in a row
    p /= p.sum(1, keepdims=True)
    order = np.array(random.sample(range(p.shape[1]), p.shape[1]))
    found, other = score(p, y), score(p[:, order], np.argsort(order)[y])
    assert [plain(other[name]) for name in METRICS] == pytest.approx(
        [plain(found[name]) for name in METRICS], abs=1e-9, nan_ok=True
    )
    for row, k in zip(other["per_class"], order, strict=True):
        assert row == pytest.approx(found["per_class"][k], abs=1e-9)
    assert other["confusion"] == np.array(found["confusion"])[np.ix_(order, order)].tolist()


def test_calibrated_and_overconfident():
    """Right as often as it says, and as often while it says more."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    right = rng.random(20_000) < confidence
    y = np.where(right, 0, 1)
    honest = score(np.stack([confidence, 1 - confidence], 1), y)
    bold = score(np.stack([(1 + confidence) / 2, (1 - confidence) / 2], 1), y)
    assert honest["calibration_error"] < 0.02
    assert bold["calibration_error"] == pytest.approx(0.125, abs=0.01)  # the mean of (1 - confidence) / 2
    assert bold["log_loss"] > honest["log_loss"]


def test_bins_of_confidence_hold_their_upper_edge_and_1_is_in_the_last():
    # 0.96 and 1 lie in one bin, with a mean confidence of 0.98 and half of it right; 0.6 = 9/15 lies with 0.55, below its edge.
    p = np.array([[0.96, 0.04], [1.0, 0.0], [0.6, 0.4], [0.55, 0.45]])
    found = score(p, np.array([0, 1, 0, 1]))["calibration_error"]
    assert found == pytest.approx(0.5 * abs(0.5 - 0.98) + 0.5 * abs(0.5 - 0.575))


def test_equal_probabilities_are_the_first_class():
    found = score(np.full((4, 2), 0.5), np.array([0, 0, 0, 1]))
    assert found["confusion"] == [[3, 0], [1, 0]]
    assert (found["accuracy"], found["balanced_accuracy"], found["auroc"]) == (0.75, 0.5, 0.5)


def test_a_class_that_does_not_occur_but_is_predicted():
    """Its predictions are wrong, it counts 0 in macro recall, precision and F1, and nothing in balanced accuracy and AUROC."""
    p = np.array([[0.6, 0.1, 0.3], [0.2, 0.1, 0.7], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]])
    found = score(p, np.array([0, 0, 1, 1]))
    assert found["balanced_accuracy"] == 0.5
    assert found["recall"] == pytest.approx(1 / 3)
    assert found["precision"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert found["per_class"][2] == {"precision": 0.0, "recall": None, "f1": 0.0, "auroc": None, "support": 0}
    assert found["auroc"] == np.mean([found["per_class"][k]["auroc"] for k in (0, 1)])


def test_a_class_that_neither_occurs_nor_is_predicted_takes_no_part():
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.8, 0.1, 0.1]])
    found = score(p, np.array([0, 1, 1]))
    assert found["per_class"][2] == {"precision": None, "recall": None, "f1": None, "auroc": None, "support": 0}
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((0.75, 0.75, 2 / 3))


def test_a_class_that_is_never_predicted_counts_0_in_precision():
    found = score(np.array([[0.7, 0.3], [0.9, 0.1]]), np.array([0, 1]))
    assert found["per_class"][1] == {"precision": None, "recall": 0.0, "f1": 0.0, "auroc": 0.0, "support": 1}
    assert found["precision"] == 0.25


def test_only_one_class_occurs():
    p, _ = some_predictions(3, 50, 3)
    found = score(p, np.full(50, 2))
    assert found["auroc"] is None
    assert [row["auroc"] for row in found["per_class"]] == [None] * 3
    assert found["accuracy"] == found["balanced_accuracy"] == found["per_class"][2]["recall"] == (p.argmax(1) == 2).mean()


def test_one_patch():
    found = score(np.array([[0.25, 0.75]]), np.array([1]))
    assert [found[name] for name in METRICS] == [1, 1, 1, 1, 1, None, pytest.approx(-np.log(0.75)), 0.25]


def test_certain_and_wrong_costs_much_but_not_infinitely():
    p, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 1])
    assert score(p, y)["log_loss"] == pytest.approx(-np.log(np.finfo(float).eps) / 2)
    assert score(p[1:] * (1 + 1e-12), y[1:])["log_loss"] >= 0  # nothing is gained by rounding


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_of_either_precision_and_a_little_above_1(dtype):
    """torchmetrics takes a matrix with a value above 1 for logits, all of it."""
    p, y = some_predictions(4, 200, 3)
    wanted = score(p, y)
    p[7] = 0
    p[7, y[7]] = 1
    exact = score(p, y)
    p[7, y[7]] += 2e-7
    one = score(p.astype(dtype), y.astype(np.int32))
    assert [one[name] for name in METRICS] == pytest.approx([exact[name] for name in METRICS], abs=1e-5)
    assert one["auroc"] == pytest.approx(wanted["auroc"], abs=0.01)
    assert one["confusion"] == exact["confusion"]


def test_predictions_that_are_not_numbers():
    p, y = some_predictions(4, 20, 3)
    p[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"predictions contain NaN or infinity.*--learning-rate"):
        score(p, y)


def test_accuracies_are_those_of_score():
    p, y = some_predictions(6, 100, 4)
    found = score(p, y)
    assert accuracies(p.argmax(1), y) == pytest.approx({name: found[name] for name in ("accuracy", "balanced_accuracy")})


def test_better_and_worse():
    """The names of what is better when lower, held to what a perfect and a random model get."""
    y = np.arange(200) % 4
    perfect, random = score(np.eye(4)[y], y), score(probabilities_of(np.random.default_rng(0).normal(size=(200, 4))), y)
    assert {name for name in METRICS if perfect[name] < random[name]} == {
        name for name in METRICS if METRICS[name].lower_is_better
    }
