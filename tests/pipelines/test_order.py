"""The order of an epoch and the ranks' parts of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.order import epoch_order, rank_slice, steps_per_epoch

PINNED = [2, 4, 1, 6, 7, 0, 3, 8, 9, 10, 5, 11]
SOME_IDS = st.lists(st.integers(0, 2**40), min_size=1, max_size=80, unique=True)


@settings(max_examples=60, deadline=None)
@given(SOME_IDS, st.integers(0, 2**64 - 1), st.integers(0, 1000), st.randoms())
def test_order_is_a_permutation_and_depends_on_the_set_alone(ids, seed, epoch, shuffler):
    order = epoch_order(np.array(ids), seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == sorted(ids)
    listed = ids.copy()
    shuffler.shuffle(listed)
    np.testing.assert_array_equal(epoch_order(np.array(listed), seed=seed, epoch=epoch), order)


@settings(max_examples=30, deadline=None)
@given(SOME_IDS, SOME_IDS)
def test_ids_keep_their_relative_order_whatever_is_selected_beside_them(ids, more):
    """Each id's place is drawn for itself, so that a larger selection doesn't shuffle the smaller one anew."""
    smaller = epoch_order(np.array(ids), seed=1, epoch=2)
    larger = epoch_order(np.array(sorted({*ids, *more})), seed=1, epoch=2)
    np.testing.assert_array_equal(larger[np.isin(larger, ids)], smaller)


def test_epochs_and_seeds_are_shuffled_differently():
    ids = np.arange(1000)
    orders = [epoch_order(ids, seed=seed, epoch=epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))] + [ids]
    for i, one in enumerate(orders):
        for two in orders[:i]:
            assert abs(np.corrcoef(one, two)[0, 1]) < 0.15
            assert (one == two).mean() < 0.02


def test_order_is_that_of_published_runs():
    """Pinned: whoever changes the order changes the result of every run, and has to say so."""
    assert epoch_order(np.arange(12), seed=42, epoch=1).tolist() == PINNED


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 90))
def test_ranks_parts_joined_are_the_global_batch(world_size, batch_size, patches):
    order = np.random.default_rng(0).permutation(patches)
    for step in range(steps_per_epoch(patches, batch_size, drop_last=False)):
        parts = [rank_slice(order, step, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), order[step * batch_size : (step + 1) * batch_size])
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        if len(order[step * batch_size :]) >= batch_size and batch_size % world_size == 0:
            assert len(set(lengths)) == 1  # what NT-Xent over ranks relies on


@pytest.mark.parametrize(
    ("patches", "batch_size", "whole", "all_of_it"), [(55, 8, 6, 7), (56, 8, 7, 7), (7, 8, 0, 1), (8, 8, 1, 1)]
)
def test_steps_per_epoch(patches, batch_size, whole, all_of_it):
    assert steps_per_epoch(patches, batch_size, drop_last=True) == whole
    assert steps_per_epoch(patches, batch_size, drop_last=False) == all_of_it
