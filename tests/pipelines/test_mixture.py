"""Mixtures: each set's share, its own passes in their own orders, and draws that have nothing to do with another set's."""

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.loader import ViewLoader
from pipelines.mixture import Mixture, Part, apportion, interleave
from pipelines.recipes import get_recipe
from pipelines.sampler import epoch_order
from pipelines.shard_reader import ShardReader

SIMCLR, EVAL = get_recipe("simclr"), get_recipe("eval")
SOME_WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def readers(shard_set, drawn_set):
    """55 and 24 patches."""
    return ShardReader(shard_set), ShardReader(drawn_set)


def loader_of(mixture, recipe=EVAL, *, batch_size=10, **settings):
    settings = {"image_size": 16, "seed": 5, "threads": 1} | settings
    return ViewLoader(mixture, mixture.ids, batch_size=batch_size, recipe=recipe, **settings)


# Shares


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**7), SOME_WEIGHTS)
def test_shares_are_those_of_the_largest_remainder(patches, weights):
    """Each is its quota rounded down or up, and none was rounded up that has a smaller remainder than one rounded down."""
    counts = apportion(patches, weights)
    quotas = [patches * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    assert sum(counts) == patches
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
    rests = [(quota - int(quota), count > quota) for count, quota in zip(counts, quotas, strict=True)]
    assert max([rest for rest, up in rests if not up], default=0) <= min([rest for rest, up in rests if up], default=1)


def test_equal_remainders_go_to_the_first():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(11, [0.1, 0.1, 0.1]) == [4, 4, 3]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_sets_are_mixed_evenly(counts):
    sets = np.repeat(np.arange(len(counts)), counts)[interleave(counts)]
    assert np.bincount(sets).tolist() == counts
    for number, count in enumerate(counts):
        so_far = np.cumsum(sets == number)
        expected = np.arange(1, len(sets) + 1) * count / len(sets)
        assert np.abs(so_far - expected).max() <= (1 + len(counts)) / 2


# Orders


@pytest.mark.parametrize("window", [None, 1, 2])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_each_set_goes_on_where_it_stopped(readers, window, data):
    """Over the epochs, a set's patches are its passes one after the other; they are told apart by the epochs of their views."""
    chosen = [np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))) for n in (55, 24)]
    weights = data.draw(st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)))
    mixture = Mixture([Part(*part) for part in zip(readers, chosen, weights, strict=True)])
    counts = apportion(len(mixture.ids), weights)
    if not all(counts):
        return
    epochs = [mixture.epoch_order(mixture.ids, seed=9, epoch=epoch, window=window) for epoch in range(4)]
    for order in epochs:
        assert [int((order.ids < 55).sum()), int((order.ids >= 55).sum())] == counts
    for number, (reader, ids, start) in enumerate(zip(readers, chosen, (0, 55), strict=True)):
        mine = [order.ids // 55 == number for order in epochs]
        found = np.concatenate([order.ids[own] for order, own in zip(epochs, mine, strict=True)])
        passes = np.concatenate([order.epochs[own] for order, own in zip(epochs, mine, strict=True)])
        np.testing.assert_array_equal(passes, np.arange(len(found)) // len(ids))
        for each in np.unique(passes):
            one_pass = found[passes == each] - start
            assert len(set(one_pass.tolist())) == len(one_pass) and set(one_pass.tolist()) <= set(ids.tolist())
            if number == 0:  # the first set's order is that of the set alone
                alone = epoch_order(ids, seed=9, epoch=int(each), shards=reader.shards[ids], window=window)
                np.testing.assert_array_equal(one_pass, alone[: len(one_pass)])


def test_sets_of_the_same_patches_have_unrelated_orders_and_draws(readers):
    twice = Mixture([Part(readers[0], np.arange(55)), Part(readers[0], np.arange(55))])
    order = twice.epoch_order(twice.ids, seed=5, epoch=0)
    one, two = order.ids[order.ids < 55], order.ids[order.ids >= 55] - 55
    assert sorted(one) == sorted(two) == list(range(55))
    assert (one == two).mean() < 0.15
    loader = loader_of(twice, SIMCLR)
    drawn = [loader.parameters(np.arange(start, start + 55)) for start in (0, 55)]
    np.testing.assert_array_equal(drawn[0].box, loader_of_alone(readers[0]).parameters(np.arange(55)).box)
    assert (drawn[0].factors == drawn[1].factors).all(axis=(1, 2)).sum() < 10  # some pairs have no jitter at all
    assert abs(np.corrcoef(drawn[0].factors[..., 0].ravel(), drawn[1].factors[..., 0].ravel())[0, 1]) < 0.35


def loader_of_alone(reader, recipe=SIMCLR, **settings):
    settings = {"batch_size": 55, "image_size": 16, "seed": 5, "threads": 1} | settings
    return ViewLoader(reader, np.arange(len(reader)), recipe=recipe, **settings)


# Through the loader


def test_views_are_those_of_the_sets_in_their_own_epochs(readers):
    """A small set that comes several times in an epoch comes with other views each time."""
    mixture = Mixture([Part(readers[0], np.arange(55), 1.0), Part(readers[1], np.arange(8), 1.0)])
    loader = loader_of(mixture, SIMCLR, batch_size=63)
    order = mixture.epoch_order(mixture.ids, seed=5, epoch=0)
    (batch,) = loader
    assert batch.id.tolist() == order.ids.tolist()
    assert loader.state_dict() == {"epoch": 1, "step": 0}
    alone = loader_of_alone(readers[0])
    (own,) = alone
    place = {patch: row for row, patch in enumerate(own.id.tolist())}
    first = np.flatnonzero(order.ids < 55)
    assert torch.equal(batch.views[:, first], own.views[:, [place[patch] for patch in order.ids[first].tolist()]])

    small = np.flatnonzero(order.ids >= 55)
    assert sorted(set(order.epochs[small].tolist())) == [0, 1, 2, 3]
    same_patch = small[order.ids[small] == order.ids[small[0]]]
    assert len(same_patch) >= 3
    for one, two in itertools.pairwise(same_patch):
        assert (batch.views[:, one] - batch.views[:, two]).abs().max() > 0.01


def test_parameters_are_those_of_each_row_alone(readers):
    """Rows of several epochs and sets are drawn in one go each, and come back in their places."""
    mixture = Mixture([Part(reader, np.arange(24)) for reader in readers])
    loader = loader_of(mixture, SIMCLR)
    ids, epochs = np.array([3, 70, 3, 55, 9, 70]), np.array([2, 0, 1, 2, 0, 5])
    together = loader.parameters(ids, epochs)
    for row in range(len(ids)):
        alone = loader.parameters(ids[row : row + 1], epochs[row : row + 1])
        for field in dataclasses.fields(together):
            np.testing.assert_array_equal(getattr(together, field.name)[row : row + 1], getattr(alone, field.name))


@pytest.mark.parametrize("window", [None, 1])
def test_restart_on_another_world_size(readers, window):
    mixture = Mixture([Part(readers[0], np.arange(40), 1.0), Part(readers[1], np.arange(24), 2.0)])
    whole = [*(loader := loader_of(mixture, SIMCLR, batch_size=12, window=window)), *loader]
    assert len(whole) == 10
    ranks = [loader_of(mixture, SIMCLR, batch_size=12, window=window, rank=rank, world_size=3) for rank in range(3)]
    for loader in ranks:
        loader.load_state_dict({"epoch": 0, "step": 4})
    for step, parts in enumerate(zip(*([*loader, *loader] for loader in ranks), strict=True), start=4):
        assert torch.equal(torch.cat([part.id for part in parts]), whole[step].id)
        assert torch.equal(torch.cat([part.views for part in parts], dim=1), whole[step].views)
    assert step == 9


def test_labels_only_where_the_classes_are_the_same(readers):
    ids = [np.arange(55), np.arange(24)]
    assert set(Mixture([Part(*part) for part in zip(readers, ids, strict=True)]).labels) == {-1}
    same = Mixture([Part(readers[0], ids[0]), Part(readers[0], ids[0])])
    np.testing.assert_array_equal(same.labels, np.tile(readers[0].labels, 2))


def test_reading_and_checking_are_passed_on(readers):
    mixture = Mixture([Part(reader, np.arange(24)) for reader in readers])
    ids = np.array([60, 3, 55, 54, 0])
    expected = [readers[1].read([5])[0], readers[0].read([3])[0], readers[1].read([0])[0], *readers[0].read([54, 0])]
    assert len(mixture) == 79
    for ours, theirs in zip(mixture.read(ids), expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    np.testing.assert_array_equal(mixture.sizes[[60, 3]], [readers[1].sizes[5], readers[0].sizes[3]])
    assert mixture.shards[[54, 55]].tolist() == [2, 3]
    mixture.check(ids)


def test_shards_are_expected_of_their_own_sets(readers, monkeypatch):
    told = []
    monkeypatch.setattr(ShardReader, "expect", lambda self, shards: told.append((self, shards.tolist())))
    Mixture([Part(reader, np.arange(24)) for reader in readers]).expect(np.array([2, 3, 0]))
    assert told == [(readers[0], [2, 0]), (readers[1], [0])]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "at least one shard set"),
        ([(np.arange(5), 0.0)], "weight is 0"),
        ([(np.arange(5), float("nan"))], "weight is nan"),
        ([(np.arange(5), -1.0)], "weight is -1"),
        ([(np.arange(0), 1.0)], "no patch is selected"),
        ([(np.array([55]), 1.0)], "0 to 54, not 55"),
        ([(np.array([-2]), 1.0)], "0 to 54, not -2"),
    ],
)
def test_mixtures_that_cannot_be(readers, parts, words):
    with pytest.raises(ValueError, match=words):
        Mixture([Part(readers[0], *part) for part in parts])


def test_weight_that_gives_no_patch_is_refused(readers):
    mixture = Mixture([Part(readers[0], np.arange(55), 1000.0), Part(readers[1], np.arange(24), 1.0)])
    with pytest.raises(ValueError, match="too small for an epoch of 79 patches") as error:
        next(iter(loader_of(mixture)))
    assert str(readers[1].folder) in str(error.value)
    with pytest.raises(ValueError, match="none of its patches is selected"):
        mixture.epoch_order(np.arange(50), seed=0, epoch=0)
