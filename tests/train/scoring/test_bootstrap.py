"""Draws by group are scores of the drawn patches, and their intervals hold what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from train.scoring import bootstrap as intervals
from train.scoring.bootstrap import (
    Difference,
    bootstrap,
    combine,
    count_units,
    difference,
    draw_units,
    interval,
    mean_and_deviation,
)
from train.scoring.metrics import METRICS, score

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def some_predictions(seed, n, classes):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    p = rng.dirichlet(np.ones(classes), n) + np.eye(classes)[y] * rng.random((n, 1))
    return p / p.sum(1, keepdims=True), y


def units_of(groups, n):
    """Each patch's unit, slowly: the groups by number, then the patches without one."""
    names = sorted({group for group in groups if group >= 0}) if groups is not None else []
    alone = [i for i in range(n) if groups is None or groups[i] < 0]
    unit = {i: len(names) + position for position, i in enumerate(alone)}
    return [unit[i] if i in unit else names.index(groups[i]) for i in range(n)], len(names) + len(alone)


def assert_draws_are_scores(p, y, groups, *, draws, seed):
    found = bootstrap(p, y, groups, draws=draws, seed=seed)
    unit, units = units_of(groups, len(y))
    times_UD = draw_units(units, range(draws), seed=seed)
    assert list(found) == list(METRICS)
    assert count_units(groups, len(y)) == units
    for d in range(draws):
        rows = np.repeat(np.arange(len(y)), times_UD[unit, d].astype(int))
        wanted = score(p[rows], y[rows])
        for name in METRICS:
            value = np.nan if wanted[name] is None else wanted[name]
            assert found[name].shape == (draws,) and found[name].dtype == np.float64
            assert found[name][d] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@st.composite
def small_predictions(draw):
    """Ties, zeros, ones, absent classes; groups known, unknown, or partly so."""
    n, classes = draw(st.integers(1, 25)), draw(st.integers(2, 4))
    parts = draw(hn.arrays(np.int64, (n, classes), elements=st.integers(0, 3)))
    parts[parts.sum(1) == 0, draw(st.integers(0, classes - 1))] = 1
    y = draw(hn.arrays(np.int64, n, elements=st.integers(0, classes - 1)))
    groups = draw(st.none() | hn.arrays(np.int64, n, elements=st.sampled_from([-1, 0, 3, 4, 1000])))
    return parts / parts.sum(1, keepdims=True), y, groups


@given(small_predictions(), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=60)
def test_each_draw_is_the_score_of_its_patches(drawn, seed):
    assert_draws_are_scores(*drawn, draws=4, seed=seed)


@pytest.mark.parametrize("at_once", [1, 700, 10**6])
def test_however_many_draws_are_made_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(intervals, "_CELLS", at_once)
    p, y = some_predictions(1, 300, 3)
    groups = np.random.default_rng(2).integers(-1, 20, 300)
    assert_draws_are_scores(p, y, groups, draws=7, seed=5)


def test_draws_are_fair_and_each_has_as_many_units():
    times_UD = draw_units(40, range(2000), seed=3)
    assert times_UD.shape == (40, 2000)
    assert (times_UD.sum(0) == 40).all()
    assert np.abs(times_UD.mean(1) - 1).max() < 0.1  # 4.5 standard deviations
    assert times_UD.var() == pytest.approx(1 - 1 / 40, abs=0.02)  # binomial
    assert len(np.unique(times_UD, axis=1).T) == 2000


def test_draws_are_of_seed_and_units_alone_and_for_ever():
    whole = draw_units(5, range(100), seed=1)
    np.testing.assert_array_equal(draw_units(5, range(40, 60), seed=1), whole[:, 40:60])
    assert not np.array_equal(draw_units(5, range(100), seed=2), whole)
    assert whole[:, :3].T.tolist() == [[1, 1, 2, 0, 1], [1, 2, 0, 2, 0], [0, 1, 3, 0, 1]]


def test_groups_are_named_by_any_numbers():
    p, y = some_predictions(3, 60, 3)
    groups = np.arange(60) % 7
    found, other = (bootstrap(p, y, codes, draws=20) for codes in (groups, 10 * groups + 5))
    assert all(np.array_equal(found[name], other[name], equal_nan=True) for name in METRICS)


def test_patches_of_a_group_come_together():
    """Two groups, one all right and one all wrong: nothing between the thirds that whole groups allow."""
    y = np.array([0, 1, 0, 1, 0, 1])
    p = np.eye(2)[[0, 1, 1, 0, 1, 0]]
    found = bootstrap(p, y, np.array([0, 0, 1, 1, 1, 1]), draws=50)["accuracy"]
    assert set(found) == {1.0, 2 / 6, 0.0}


def test_patches_without_a_group_are_units_of_their_own():
    groups = np.array([2, 2, -1, -1, 7])
    assert count_units(groups, 5) == 4
    assert count_units(None, 5) == 5
    assert count_units(np.array([3, 3, 3]), 3) == 1


def test_auroc_where_a_draw_has_only_one_class():
    """Slides of one class each, as of tumour and normal tissue."""
    p, y = some_predictions(4, 40, 2)
    y = np.sort(y)
    found = bootstrap(p, y, y, draws=100)
    lacking = np.isnan(found["auroc"])
    assert 30 < lacking.sum() < 70
    assert not np.isnan(found["accuracy"]).any()
    low, high = interval(found["auroc"])
    assert 0 <= low <= high <= 1


def test_interval():
    values = np.random.default_rng(0).permutation(np.arange(101.0))
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(values, 0.8) == pytest.approx((10, 90))
    assert interval(np.append(values, np.full(50, np.nan))) == interval(values)
    assert np.isnan(interval(np.array([np.nan, np.nan]))).all()


def test_difference_is_of_the_same_draws():
    """What two models have in common cancels: hard slides are hard for both."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 50)
    y = np.zeros(1000, int)
    first = rng.random(1000) < rng.beta(1, 1, 20)[groups]
    second = first & (rng.random(1000) < 0.9)
    a, b = (bootstrap(np.eye(2)[1 - right.astype(int)], y, groups)["accuracy"] for right in (first, second))
    found = difference(a, b)
    assert found.above == 1 and 0 < found.low < first.mean() - second.mean() < found.high
    assert interval(a)[0] < interval(b)[1]  # each on its own, they could not be told apart
    assert difference(b, a) == pytest.approx((-found.high, -found.low, 0))
    assert difference(a, a) == (0, 0, 0)


def test_difference_leaves_out_draws_without_a_value():
    found = difference(np.array([1.0, np.nan, 3.0, 1.0]), np.array([0.0, 0.0, np.nan, 2.0]))
    assert found.above == 0.5 and (found.low, found.high) == interval(np.array([1.0, -1.0]))
    assert np.isnan(difference(np.array([np.nan]), np.array([1.0]))).all()
    assert isinstance(found, Difference)


def test_combined_draws_are_of_the_mean_over_seeds():
    groups = np.arange(90) % 9
    y = some_predictions(0, 90, 3)[1]
    seeds = [bootstrap(some_predictions(seed, 90, 3)[0], y, groups, draws=30) for seed in range(3)]
    found = combine(seeds)
    for name in METRICS:
        np.testing.assert_allclose(found[name], sum(draws[name] for draws in seeds) / 3)
    assert combine(seeds[:1])["f1"].tolist() == seeds[0]["f1"].tolist()


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3, 7**0.5))
    assert mean_and_deviation([0.25]) == (0.25, None)
    assert mean_and_deviation([0.5, None]) == (None, None)


def coverage(*, groups, simulations=150, each=20, truth=0.7):
    """How often intervals hold the true accuracy, by group and by patch, of slides that differ (standard deviation 0.23)."""
    rng = np.random.default_rng(11)
    slides, y = np.repeat(np.arange(groups), each), np.zeros(groups * each, int)
    held = np.zeros(2)
    for _ in range(simulations):
        right = rng.random(len(y)) < rng.beta(3 * truth, 3 * (1 - truth), groups)[slides]
        p = np.eye(2)[1 - right.astype(int)]
        for i, codes in enumerate((slides, None)):
            low, high = interval(bootstrap(p, y, codes, draws=200)["accuracy"])
            held[i] += low <= truth <= high
    return held / simulations


def test_intervals_by_group_hold_what_they_promise_and_those_by_patch_do_not():
    by_group, by_patch = coverage(groups=30)
    assert 0.89 <= by_group <= 0.98
    assert by_patch < 0.75


def test_of_few_groups_they_hold_less():
    by_group, _ = coverage(groups=3)
    assert by_group < 0.85
