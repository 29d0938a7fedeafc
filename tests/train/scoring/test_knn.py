"""Nearest neighbours against scikit-learn's and against the formula, with ties and in pieces."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from train.scoring import knn
from train.scoring.knn import knn_probabilities, nearest


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(knn, "_QUERIES", 7)
    monkeypatch.setattr(knn, "_KNOWN", 30)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 5, 150])
def test_are_scikit_learns(count, dtype, in_pieces):
    """Where pieces have more patches than are asked for, and where they have fewer."""
    rng = np.random.default_rng(count)
    known, asked = (rng.normal(size=(n, 9)).astype(dtype) * np.logspace(-3, 3, n)[:, None] for n in (200, 40))
    distance, expected = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(known).kneighbors(asked)
    rows, cosine = nearest(known, asked, count)
    assert rows.dtype == np.int64 and cosine.dtype == np.float32
    np.testing.assert_allclose(cosine, 1 - distance, atol=1e-6)
    if dtype == np.float64:  # theirs in float32 takes some for equals that are none
        np.testing.assert_array_equal(rows, expected)


def plainly(known, asked, count):
    """All cosines at once, and a stable sort of what can be told apart."""

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    cosine = (np.round(unit(asked.astype(float)) @ unit(known.astype(float)).T * 2**24) / 2**24).astype(np.float32)
    rows = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
    return rows, np.take_along_axis(cosine, rows, 1)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(1, 9))
def test_of_equals_the_lower_row_comes_first(data, width, count, queries, pieces):
    """Small whole numbers: copies, multiples and zeros abound, in one piece and across pieces."""
    whole = st.integers(-1, 2)
    known = data.draw(arrays(np.float32, st.tuples(st.integers(1, 40), st.just(width)), elements=whole))
    asked = data.draw(arrays(np.float32, st.tuples(st.integers(0, 8), st.just(width)), elements=whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_QUERIES", queries)
        patch.setattr(knn, "_KNOWN", pieces)
        rows, cosine = nearest(known, asked, count)
    expected, cosines = plainly(known, asked, count)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(cosine, cosines)


def test_copies_of_a_patch_are_equals_in_every_piece(in_pieces):
    """Products of matrices round by where a row stands; what is said of copies must not."""
    one = np.random.default_rng(0).normal(size=(1, 513)).astype(np.float32)
    known = np.repeat(one, 100, axis=0) * np.float32(2) ** np.arange(100)[:, None].astype(np.float32) / 2**50
    rows, cosine = nearest(known, np.repeat(one, 9, axis=0), 40)
    np.testing.assert_array_equal(rows, np.tile(np.arange(40), (9, 1)))
    np.testing.assert_array_equal(cosine, np.ones((9, 40), np.float32))


def test_all_where_there_are_fewer_and_none_where_nothing_is_asked():
    known = np.eye(3)
    rows, cosine = nearest(known, np.array([[0.0, 2, 1]]), 5)
    assert rows.tolist() == [[1, 2, 0]] and cosine[0, 2] == 0
    assert [found.shape for found in nearest(known, np.zeros((0, 3)), 2)] == [(0, 2), (0, 2)]


@pytest.mark.parametrize("which", [0, 1])
def test_features_that_are_no_numbers(which):
    given = [np.eye(3), np.eye(3)]
    given[which][1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        nearest(*given, 2)


def test_nothing_known():
    with pytest.raises(ValueError, match="no patches to search"):
        nearest(np.zeros((0, 3)), np.eye(3), 1)


@pytest.mark.parametrize(("known", "temperature"), [(5, 0.07), (300, 0.07), (300, 5.0)])
def test_votes_are_those_of_the_formula(known, temperature, in_pieces):
    """One query and one neighbour at a time; with fewer patches than neighbours, too. The last class has no patch."""
    rng = np.random.default_rng(known)
    labels = rng.integers(0, 4, known)
    x, asked = rng.normal(size=(known, 6)) + labels[:, None], rng.normal(size=(40, 6)) + 1
    p = knn_probabilities(x, labels, asked, classes=5, neighbours=20, temperature=temperature)
    assert p.shape == (40, 5) and p.dtype == np.float64
    for query, found in zip(asked, p, strict=True):
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in x]
        votes = [0.0] * 5
        for i in sorted(range(known), key=lambda i: -cosines[i])[:20]:
            votes[labels[i]] += math.exp(cosines[i] / temperature)
        np.testing.assert_allclose(found, np.array(votes) / sum(votes), rtol=1e-4, atol=1e-12)


def test_a_low_temperature_leaves_the_nearest_alone_and_does_not_overflow():
    known, labels = np.array([[1.0, 0.1], [1, 0.2], [1, 0.3]]), np.array([1, 0, 0])
    p = knn_probabilities(known, labels, np.array([[1.0, 0]]), classes=2, neighbours=3, temperature=1e-5)
    np.testing.assert_allclose(p, [[0, 1]], atol=1e-12)
    p = knn_probabilities(known, labels, np.array([[-1.0, 0]]), classes=2, neighbours=3, temperature=1e5)
    np.testing.assert_allclose(p, [[2 / 3, 1 / 3]], atol=1e-4)
