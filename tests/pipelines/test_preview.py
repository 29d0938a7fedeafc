"""The sheet of views, and its script."""

import numpy as np
import pytest
from PIL import Image

from pipelines.loader import ViewLoader
from pipelines.preview import describe_view, view_sheet
from pipelines.recipes import get_recipe
from pipelines.shards import ShardReader
from pipelines.views import OPERATIONS, draw_views
from tests.helpers import assert_refused, run_python

GAP, CAPTION = 8, 38


def cells(sheet, patch, views, image_size, columns):
    """The patch and its views, cut out of the sheet."""
    pixels = np.asarray(sheet)
    step = image_size + GAP
    left = GAP + (step * (1 + views) + GAP) * (patch % columns)
    top = GAP + (step + CAPTION) * (patch // columns)
    return [pixels[top : top + image_size, left + step * k : left + step * k + image_size] for k in range(1 + views)]


@pytest.mark.parametrize(("columns", "size"), [(1, (167, 463)), (2, (334, 281))])
def test_sheet_shows_what_the_loader_gives(shard_set, columns, size):
    """For patches in any order, and for the epoch asked for."""
    reader, recipe, ids = ShardReader(shard_set), get_recipe("simclr"), np.array([20, 3, 41, 7, 30])
    sheet = view_sheet(reader, ids, recipe=recipe, image_size=45, seed=9, epoch=2, columns=columns)
    assert sheet.size == size
    loader = ViewLoader(reader, ids, batch_size=5, image_size=45, recipe=recipe, seed=9, shuffle=False, threads=1)
    loader.load_state_dict({"epoch": 2, "step": 0})
    views = next(iter(loader)).views.permute(0, 1, 3, 4, 2).numpy() * np.array(recipe.std) + np.array(recipe.mean)
    for i in range(5):
        whole, *shown = cells(sheet, i, 2, 45, columns)
        for view in range(2):
            np.testing.assert_allclose(shown[view], views[view, i] * 255, atol=0.51)
        assert whole.std() > 5  # the patch itself, not the paper


def test_first_cell_is_the_whole_patch(shard_set):
    reader, ids = ShardReader(shard_set), np.arange(4)
    plain = view_sheet(reader, ids, recipe=get_recipe("eval-plain"), image_size=32, seed=1)
    for i in range(4):
        whole, view = cells(plain, i, 1, 32, 1)
        assert np.abs(whole.astype(int) - view).mean() < 12  # resized by Pillow and by DALI


def test_description_says_what_was_drawn():
    recipe = get_recipe("simclr")
    drawn = draw_views(np.arange(60), seed=1, epoch=0, recipe=recipe, sizes=np.full((60, 2), 99))
    jittered = int(np.flatnonzero(drawn.order[:, 1, 0] >= 0)[0])
    top, left, height, width = drawn.box[jittered, 1]
    text = describe_view(drawn, jittered, 1)
    assert text.startswith(f"{width} x {height} at {left}, {top}")
    places = [text.index(OPERATIONS[operation][:6]) for operation in drawn.order[jittered, 1]]
    assert places == sorted(places)  # in the order of application
    for operation, name in enumerate(OPERATIONS):
        assert f"{name[:6]} {drawn.factors[jittered, 1, operation]:+.2f}" in text
    for i in range(60):
        text = describe_view(drawn, i, 0)
        assert ("flip" in text, "grey" in text) == (drawn.flip[i, 0], drawn.grey[i, 0])
        assert ("bright" in text) == (drawn.order[i, 0, 0] >= 0)


def test_script_makes_a_picture(shard_set, tmp_path):
    done = run_python(
        "pipelines/preview.py", "--data", shard_set, "--out", tmp_path / "views.png", "--recipe", "supervised",
        "--patches", 3, "--image-size", 40, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'views.png'}\n"
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (GAP + 2 * 48, 3 * 86 + GAP)


def test_script_refuses_a_folder_that_is_no_shard_set(tmp_path):
    done = run_python("pipelines/preview.py", "--data", tmp_path, "--out", tmp_path / "views.png", cwd=tmp_path)
    assert_refused(done, str(tmp_path), "not a shard set")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"), [({"patches": 0}, "--patches 0"), ({"recipe": "x"}, "'x'"), ({"split": "x"}, "'x'")]
)
def test_settings_that_cannot_be(shard_set, tmp_path, settings, words):
    from pipelines.preview import PreviewConfig, main

    with pytest.raises(ValueError, match=words):
        main(PreviewConfig(data=str(shard_set), out=str(tmp_path / "views.png"), **settings))
    assert not list(tmp_path.iterdir())
