"""The DALI graph against the torchvision reference, recipe by recipe, with the same draws."""

import numpy as np
import pytest
import torch

from pipelines.dali_graph import AHEAD, DaliGraph
from pipelines.recipes import RECIPES, get_recipe
from pipelines.shard_reader import ShardReader
from pipelines.torchvision_reference import reference_views
from pipelines.views import draw_views


def differences(shards, name, image_size):
    """In levels of 255, over all patches of a set."""
    reader, recipe = ShardReader(shards), get_recipe(name)
    ids = np.arange(len(reader))
    drawn = draw_views(ids, seed=5, epoch=1, recipe=recipe, sizes=reader.sizes)
    graph = DaliGraph(recipe=recipe, batch_size=len(ids), image_size=image_size, device="cpu", threads=1)
    graph.put(reader.read(ids), drawn)
    views = graph.get()
    assert views.shape == (recipe.views, len(ids), 3, image_size, image_size) and graph.pending == 0
    reference = reference_views(reader.read(ids), drawn, recipe=recipe, image_size=image_size)
    return (views - reference).abs().mul(torch.tensor(recipe.std).view(3, 1, 1) * 255).numpy()


@pytest.mark.parametrize("image_size", [40, 128])
@pytest.mark.parametrize("name", RECIPES)
def test_views_are_the_references(drawn_set, name, image_size):
    """Patches of 96 px, made smaller and larger."""
    assert differences(drawn_set, name, image_size).max() <= 0.05


@pytest.mark.parametrize("name", ["pathology", "rotnet-jitter", "simclr-blur", "eval", "eval-plain"])
def test_images_of_awkward_shapes(shard_set, name):
    """A single pixel, lines, PNG and JPEG, hardly one square."""
    assert differences(shard_set, name, 32).max() <= 0.05


def test_batches_come_out_in_the_order_in_which_they_were_put(drawn_set):
    reader, recipe = ShardReader(drawn_set), get_recipe("rotnet")
    graph = DaliGraph(recipe=recipe, batch_size=4, image_size=24, device="cpu", threads=1)
    batches = [np.arange(4), np.arange(4, 7)]  # the second is smaller
    drawn = [draw_views(ids, seed=5, epoch=1, recipe=recipe, sizes=reader.sizes[ids]) for ids in batches]
    assert len(batches) == AHEAD
    for ids, parameters in zip(batches, drawn, strict=True):
        graph.put(reader.read(ids), parameters)
    for ids, parameters in zip(batches, drawn, strict=True):
        reference = reference_views(reader.read(ids), parameters, recipe=recipe, image_size=24)
        assert (graph.get() - reference).abs().max() < 0.001


@pytest.mark.parametrize("excess", [(0, 1), (1, 0), (10**6, 10**6)])
def test_box_beyond_the_image(drawn_set, excess):
    """Numba checks no bounds, so the kernel compares the box with the image as it was decoded."""
    reader, recipe = ShardReader(drawn_set), get_recipe("eval-plain")
    ids = np.arange(4)
    sizes = reader.sizes[ids] + np.array([[0, 0], [0, 0], excess, [0, 0]])
    graph = DaliGraph(recipe=recipe, batch_size=4, image_size=24, device="cpu", threads=1)
    graph.put(reader.read(ids), draw_views(ids, seed=5, epoch=1, recipe=recipe, sizes=sizes))
    with pytest.raises(RuntimeError, match="image 2 of the batch is smaller than the box"):
        graph.get()
