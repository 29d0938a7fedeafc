"""Figures of a classification against scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics as sk

from train.metrics import TITLES, score

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


@pytest.mark.parametrize(("n", "classes"), [(300, 2), (400, 3), (150, 7)])
def test_against_scikit_learn(n, classes):
    p, y = some_predictions(classes, n, classes)
    found, guess = score(p, y), p.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, guess), abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, guess), abs=1e-6)
    assert found["f1"] == pytest.approx(sk.f1_score(y, guess, average="macro"), abs=1e-6)
    truth = p[:, 1] if classes == 2 else p
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, truth, multi_class="ovr", average="macro"), abs=1e-6)
    assert found["log_loss"] == pytest.approx(sk.log_loss(y, p), abs=1e-6)
    assert found["recall"] == pytest.approx(sk.recall_score(y, guess, average=None).tolist(), abs=1e-6)
    assert found["confusion"] == sk.confusion_matrix(y, guess).tolist()
    # The figures are of unequal things: one in another's place would be seen.
    assert len({round(found[name], 6) for name in TITLES}) == len(TITLES)


def test_calibration_error_by_its_definition():
    """15 bins of confidence; the mean distance between accuracy and confidence, weighted by the bins' counts."""
    p, y = some_predictions(5, 500, 3, skill=0.5)
    confidence, right = p.max(1), p.argmax(1) == y
    bins = np.minimum((confidence * 15).astype(int), 14)
    wanted = sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in range(15) if (bins == b).any()
    )
    assert score(p, y)["calibration_error"] == pytest.approx(wanted, abs=1e-6)


def test_equal_probabilities_are_the_first_class():
    p, y = np.full((4, 2), 0.5), np.array([0, 0, 0, 1])
    found = score(p, y)
    assert found["confusion"] == [[3, 0], [1, 0]]
    assert (found["accuracy"], found["balanced_accuracy"], found["auroc"]) == (0.75, 0.5, 0.5)
    assert found["f1"] == pytest.approx(sk.f1_score(y, [0, 0, 0, 0], average="macro"), abs=1e-6)


def test_ties_between_patches_count_half_in_the_auroc():
    rng = np.random.default_rng(1)
    p = rng.dirichlet([1, 1, 1], 300).round(1)
    p[:, 2] = 1 - p[:, :2].sum(1)
    p = np.clip(p, 0, 1)
    y = rng.integers(0, 3, 300)
    wanted = np.mean([sk.roc_auc_score(y == k, p[:, k]) for k in range(3)])
    assert score(p, y)["auroc"] == pytest.approx(wanted, abs=1e-6)


def test_class_that_does_not_occur():
    """Means are over the classes that occur; predictions of the absent one still count as wrong."""
    p, y = some_predictions(2, 300, 3)
    keep = y != 1
    p, y = p[keep], y[keep]
    found, guess = score(p, y), p.argmax(1)
    assert (guess == 1).any()
    assert found["recall"][1] is None
    assert found["balanced_accuracy"] == pytest.approx(np.mean([(guess[y == k] == k).mean() for k in (0, 2)]), abs=1e-6)
    assert found["auroc"] == pytest.approx(np.mean([sk.roc_auc_score(y == k, p[:, k]) for k in (0, 2)]), abs=1e-6)
    assert found["f1"] == pytest.approx(sk.f1_score(y, guess, average="macro"), abs=1e-6)
    assert found["log_loss"] == pytest.approx(sk.log_loss(y, p, labels=[0, 1, 2]), abs=1e-6)
    assert found["confusion"] == sk.confusion_matrix(y, guess, labels=[0, 1, 2]).tolist()


def test_class_that_neither_occurs_nor_is_predicted_takes_no_part_in_f1():
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.8, 0.1, 0.1]])
    y = np.array([0, 1, 1])
    assert score(p, y)["f1"] == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro"), abs=1e-6)


def test_only_one_class_occurs():
    p, _ = some_predictions(3, 50, 3)
    y = np.full(50, 2)
    found = score(p, y)
    assert found["auroc"] is None
    assert found["recall"][:2] == [None, None]
    assert found["accuracy"] == found["balanced_accuracy"] == found["recall"][2] == pytest.approx((p.argmax(1) == 2).mean())


def test_certain_and_wrong_costs_much_but_not_infinitely():
    p, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 1])
    assert score(p, y)["log_loss"] == pytest.approx(-np.log(1e-15) / 2)


def test_single_precision_probabilities_give_the_same():
    p, y = some_predictions(4, 200, 3)
    one, two = score(p.astype(np.float32), y.astype(np.int32)), score(p, y)
    assert [one[name] for name in TITLES] == pytest.approx([two[name] for name in TITLES], abs=1e-5)
    assert one["confusion"] == two["confusion"]
