"""Memory that batches take turns in: never one that somebody holds."""

import numpy as np
import torch

from pipelines.buffer_pool import BatchMemory
from pipelines.loader import ViewLoader
from pipelines.recipes import get_recipe


def test_memory_comes_back_when_nothing_of_a_batch_is_left():
    memory = BatchMemory(24, keep=2)
    first = memory.take((2, 3, 4))
    address = first.data_ptr()
    part, as_numpy = first[1:, :2], first.numpy()
    del first
    assert memory.take((2, 3, 4)).data_ptr() != address
    del part
    assert memory.take((2, 3, 4)).data_ptr() != address
    del as_numpy
    smaller = memory.take((1, 3, 4))
    assert smaller.data_ptr() == address and smaller.shape == (1, 3, 4)


def test_no_more_is_kept_than_was_asked_for():
    memory = BatchMemory(10, keep=2)
    held = [memory.take((10,)) for _ in range(5)]
    addresses = {tensor.data_ptr() for tensor in held}
    assert len(addresses) == 5
    held.clear()
    assert len(memory._free) == 2


def test_batches_that_are_kept_stay_as_they_were(small_set):
    loader = ViewLoader(
        small_set, np.arange(24), batch_size=5, image_size=24, recipe=get_recipe("simclr"), seed=3, drop_last=False
    )
    with loader:
        kept = list(loader)
        copies = [batch.views.clone() for batch in kept]
        assert len({batch.views.data_ptr() for batch in kept}) == len(kept) == 5
        for _ in loader:  # the next epoch, with other views
            pass
        assert all(torch.equal(batch.views, copy) for batch, copy in zip(kept, copies, strict=True))


def test_a_batch_outlives_its_loader(small_set):
    with ViewLoader(small_set, np.arange(24), batch_size=6, image_size=24, recipe=get_recipe("simclr"), seed=3) as loader:
        batch = next(iter(loader))
        copy = batch.views.clone()
    del loader
    assert torch.equal(batch.views, copy)


def test_batches_that_are_let_go_take_turns(small_set):
    with ViewLoader(small_set, np.arange(24), batch_size=2, image_size=24, recipe=get_recipe("simclr"), seed=3) as loader:
        addresses = [batch.views.data_ptr() for batch in loader]
    assert len(addresses) == 12
    assert len(set(addresses)) <= 4, "two under way, one in use, one that the loop still holds when it asks for the next"
