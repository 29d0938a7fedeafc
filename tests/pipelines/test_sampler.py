"""The order of an epoch and the ranks' parts of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sampler import Order, by_first_use, epoch_order, rank_slice, steps_per_epoch

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


# Each patch once, whatever the world size


def joined(order, steps, batch_size, world_size):
    """What the ranks read at these steps, each rank's part behind the one before it."""
    parts = [
        rank_slice(order, step, batch_size, rank=rank, world_size=world_size) for step in steps for rank in range(world_size)
    ]
    return np.concatenate([order[:0], *parts])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 120), st.integers(1, 50), st.integers(1, 9))
def test_evaluation_reads_each_patch_exactly_once_on_any_world(patches, batch_size, world_size):
    order = epoch_order(np.arange(patches), seed=3, epoch=1)
    steps = range(steps_per_epoch(patches, batch_size, drop_last=False))
    np.testing.assert_array_equal(joined(order, steps, batch_size, world_size), order)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 120), st.integers(1, 24), st.booleans())
def test_world_size_may_change_at_any_step(data, patches, batch_size, drop_last):
    """Steps are done by one world after the other; what they read is what one process reads."""
    order = epoch_order(np.arange(patches), seed=8, epoch=2)
    steps = steps_per_epoch(patches, batch_size, drop_last=drop_last)
    cuts = sorted(data.draw(st.lists(st.integers(0, steps), max_size=4)))
    found = [
        joined(order, range(start, stop), batch_size, data.draw(st.integers(1, 8)))
        for start, stop in zip([0, *cuts], [*cuts, steps], strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(found), order[: steps * batch_size])


def test_part_of_an_order_is_the_callers_own():
    order = Order(np.arange(10), np.broadcast_to(np.int64(4), 10))
    part = order.part(1, 4, rank=1, world_size=2)
    assert part.ids.tolist() == [6, 7] and part.epochs.tolist() == [4, 4]
    part.ids[:] = part.epochs[:] = -1
    assert order.ids.tolist() == list(range(10)) and set(order.epochs) == {4}


# Windows

PINNED_WINDOW = [4, 6, 7, 3, 8, 5, 2, 1, 0, 9, 10, 11]


@st.composite
def sharded(draw):
    """Ids and their shards, as a set has them: shards follow each other, and not all of a shard's patches are selected."""
    ids = np.array(draw(SOME_IDS))
    return ids, ids * draw(st.integers(1, 12)) // (2**40 + 1) if draw(st.booleans()) else ids % draw(st.integers(1, 30))


@settings(max_examples=100, deadline=None)
@given(sharded(), st.integers(1, 12), st.integers(0, 2**64 - 1), st.integers(0, 1000), st.randoms())
def test_a_window_reads_each_id_once_and_few_shards_at_a_time(selected, window, seed, epoch, shuffler):
    ids, shards = selected
    order = epoch_order(ids, seed=seed, epoch=epoch, shards=shards, window=window)
    assert sorted(order.tolist()) == sorted(ids.tolist())

    shard_of = dict(zip(ids.tolist(), shards.tolist(), strict=True))
    read = [shard_of[i] for i in order.tolist()]
    first = list(dict.fromkeys(read))
    place = {shard: turn // window for turn, shard in enumerate(first)}
    # Shards are numbered off in the order in which they are first read: no run is begun before the one before it is read.
    runs = [place[shard] for shard in read]
    assert runs == sorted(runs)

    everything = epoch_order(ids, seed=seed, epoch=epoch)
    for run in set(runs):
        members = [i for i, its in zip(order.tolist(), runs, strict=True) if its == run]
        assert members == [i for i in everything.tolist() if i in set(members)]

    listed = list(range(len(ids)))
    shuffler.shuffle(listed)
    again = epoch_order(ids[listed], seed=seed, epoch=epoch, shards=shards[listed], window=window)
    np.testing.assert_array_equal(again, order)


@settings(max_examples=60, deadline=None)
@given(sharded(), st.integers(0, 5))
def test_a_window_of_all_shards_is_the_global_order(selected, more):
    ids, shards = selected
    window = len(np.unique(shards)) + more
    order = epoch_order(ids, seed=4, epoch=7, shards=shards, window=window)
    np.testing.assert_array_equal(order, epoch_order(ids, seed=4, epoch=7))


def test_shards_are_shuffled_anew_in_each_epoch_and_not_as_patches_are():
    """With a shard for each patch, a window of one shows the order of the shards."""
    ids = np.arange(1000)
    orders = [epoch_order(ids, seed=s, epoch=e, shards=ids, window=1) for s, e in ((1, 0), (1, 1), (2, 0))]
    orders += [epoch_order(ids, seed=1, epoch=0), ids]
    for i, one in enumerate(orders):
        for two in orders[:i]:
            assert abs(np.corrcoef(one, two)[0, 1]) < 0.15
            assert (one == two).mean() < 0.02


def test_windowed_order_is_that_of_published_runs():
    """Pinned, as the global order is."""
    order = epoch_order(np.arange(12), seed=42, epoch=1, shards=np.arange(12) // 3, window=2)
    assert order.tolist() == PINNED_WINDOW


@given(st.lists(st.integers(0, 20), max_size=60))
def test_shards_in_order_of_need(shards):
    assert by_first_use(np.array(shards, np.int32)).tolist() == list(dict.fromkeys(shards))
