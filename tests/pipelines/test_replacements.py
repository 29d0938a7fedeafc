"""Damaged patches: what is read in their place is a function of (seed, epoch, patch), whatever else the loader does."""

import shutil

import numpy as np
import pytest
import torch

from pipelines.loader import ViewLoader
from pipelines.mixture import Mixture, Part
from pipelines.recipes import get_recipe
from pipelines.replacements import Replacements
from pipelines.shard_reader import ShardReader
from pipelines.torchvision_reference import reference_views
from pipelines.views import draw_views
from sharding.philox import uniforms
from tests.helpers import damage_patches

SIMCLR = get_recipe("simclr")
DAMAGED = {7, 30, 31}


def loader_of(shards, ids=None, *, batch_size=11, **settings):
    ids = np.arange(55) if ids is None else ids
    settings = {"threads": 1, "replace_damaged": True, "drop_last": False} | settings
    return ViewLoader(shards, ids, batch_size=batch_size, image_size=16, recipe=SIMCLR, seed=5, **settings)


def epoch_of(loader):
    """By place in the order: ids, labels, and views with the patches first."""
    batches = list(loader)
    ids, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("id", "label"))
    return ids, labels, torch.cat([batch.views for batch in batches], dim=1).swapaxes(0, 1)


@pytest.fixture(scope="module")
def damaged_set(shard_set, tmp_path_factory):
    copied = shutil.copytree(shard_set, tmp_path_factory.mktemp("damaged") / "copied")
    damage_patches(copied, DAMAGED)
    return copied


@pytest.fixture(scope="module")
def first_epoch(damaged_set):
    loader = loader_of(damaged_set)
    found = epoch_of(loader)
    assert loader.damaged == DAMAGED
    return found


def test_other_patches_are_what_they_are_in_a_whole_set(shard_set, first_epoch):
    ids, labels, views = epoch_of(loader_of(shard_set))
    kept = ~np.isin(ids, list(DAMAGED))
    for ours, theirs in zip(first_epoch, (ids, labels, views), strict=True):
        assert torch.equal(ours[kept], theirs[kept])
    assert not set(first_epoch[0].tolist()) & DAMAGED
    assert not torch.equal(first_epoch[2][~kept], views[~kept])


def test_replacement_has_its_own_pixels_and_label_and_the_draws_of_the_patch(shard_set, damaged_set, first_epoch):
    """Not its own draws: the epoch shows it a second time, and views of one image that are equal would be false negatives."""
    order = epoch_of(loader_of(shard_set))[0]
    ids, labels, views = epoch_of(loader_of(damaged_set, backend="torchvision"))
    assert torch.equal(ids, first_epoch[0])
    reader = ShardReader(shard_set)
    for place in np.flatnonzero(np.isin(order, list(DAMAGED))):
        patch, read = int(order[place]), int(ids[place])
        assert labels[place] == reader.labels[read]
        drawn = draw_views(np.array([patch]), seed=5, epoch=0, recipe=SIMCLR, sizes=reader.sizes[[read]])
        expected = reference_views(reader.read(np.array([read])), drawn, recipe=SIMCLR, image_size=16)
        assert torch.equal(views[place], expected[:, 0])
        (at,) = np.flatnonzero(order == read)
        assert not torch.equal(views[place], views[at])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 20])
def test_batches_ranks_and_restarts_do_not_matter(damaged_set, first_epoch, batch_size, world_size):
    ranks = [loader_of(damaged_set, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    for loader in ranks:
        loader.load_state_dict({"epoch": 0, "step": 1})  # as after a kill
    for step, parts in enumerate(zip(*ranks, strict=True), start=1):
        chosen = slice(step * batch_size, (step + 1) * batch_size)
        assert torch.equal(torch.cat([part.id for part in parts]), first_epoch[0][chosen])
        assert torch.equal(torch.cat([part.views for part in parts], dim=1).swapaxes(0, 1), first_epoch[2][chosen])


def test_each_epoch_draws_anew_from_the_selected_patches(damaged_set):
    chosen = np.arange(0, 40)[::-1]
    loader, drawn = loader_of(damaged_set, chosen, batch_size=40, backend="torchvision"), []
    for epoch in range(12):
        (batch,) = loader
        order = loader_of(damaged_set, chosen, batch_size=40, backend="torchvision")
        order.load_state_dict({"epoch": epoch, "step": 0})
        places = np.isin(order.batch_ids(0), list(DAMAGED))
        drawn += batch.id[places].tolist()
    assert len(drawn) == 36 and len(set(drawn)) > 15 and set(drawn) <= set(chosen.tolist())


def test_replacement_that_is_damaged_too_is_replaced(shard_set, tmp_path):
    copied = shutil.copytree(shard_set, tmp_path / "copied")
    first, second = (int(55 * uniforms([7], 1, seed=5, stream="replacement", epoch=3, view=view)[0, 0]) for view in (0, 1))
    damage_patches(copied, {7, first})
    replacements = Replacements(ShardReader(copied), np.arange(55), seed=5)
    assert len({7, first, second}) == 3
    assert replacements.read_for(np.array([7, 9]), np.array([3, 3])).tolist() == [second, 9]
    assert replacements.damaged == {7, first}


def test_set_that_is_damaged_throughout(shard_set, tmp_path):
    copied = shutil.copytree(shard_set, tmp_path / "copied")
    damage_patches(copied, range(55))
    with pytest.raises(
        ValueError, match=r"copied: most of its patches are damaged, among them \[.*\]: copy or build the set again"
    ):
        list(loader_of(copied))


def test_shard_that_is_cut_short(shard_set, tmp_path):
    """Its patches behind the cut are damaged; a shard that is missing still ends the iteration."""
    copied = shutil.copytree(shard_set, tmp_path / "copied")
    rows = ShardReader(copied).manifest
    rows = [row for row in rows.select(["id", "shard", "offset", "size"]).to_pylist() if row["shard"] == 1]
    tar = copied / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[: rows[-2]["offset"] + 3])
    loader = loader_of(copied, backend="torchvision")
    list(loader)
    assert loader.damaged == {rows[-2]["id"], rows[-1]["id"]}
    tar.unlink()
    with pytest.raises(ValueError, match="in the manifest but not in the folder"):
        list(loader_of(copied, backend="torchvision"))


def test_damaged_copy_in_the_cache(damaged_set, tmp_path, monkeypatch, shard_set):
    """The set at the URL is whole: its copy is no damaged set, and nothing is replaced."""
    monkeypatch.setenv("PATCHCLR_CACHE", str(tmp_path))
    with ShardReader(f"file://{shard_set}").remote as remote:
        remote.local("shard-000000.tar"), remote.local("shard-000001.tar")
        damage_patches(remote.folder, [3])
        loader = loader_of(ShardReader(remote), backend="torchvision")
        with pytest.raises(ValueError, match="this copy was changed or damaged: remove the file, and it is downloaded again"):
            list(loader)
        assert not loader.damaged


def test_mixture(shard_set, damaged_set):
    def loader():
        mixture = Mixture([Part(shard_set, np.arange(20)), Part(damaged_set, np.arange(40), 2.0)])
        return loader_of(mixture, mixture.ids, batch_size=15, backend="torchvision")

    found = loader()
    ids, _, views = epoch_of(found)
    assert found.damaged and found.damaged <= {55 + patch for patch in DAMAGED}
    assert not set(ids.tolist()) & found.damaged and len(ids) == 60
    assert (ids >= 55).sum() == 40  # replacements are of the same set, so the weights hold
    assert torch.equal(epoch_of(loader())[2], views)
    (first, *_) = found.reader.name_patches(np.array(sorted(found.damaged)))
    assert first.startswith("copied/shard-00000") and ": 00000" in first
