"""The draws: pure functions of (seed, epoch, id, view), with torchvision's distributions."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import RandomResizedCrop

from pipelines.recipes import RECIPES, ColourJitter, GaussianBlur, RandomCrop, Recipe, StainJitter, get_recipe, pathology, simclr
from pipelines.views import ViewParameters, draw_views

SIMCLR = simclr()
# Every operation there is
FULL = dataclasses.replace(pathology(), grey=0.2, blur=GaussianBlur())
FIELDS = tuple(field.name for field in dataclasses.fields(ViewParameters))


def draw(n, recipe=SIMCLR, *, seed=7, epoch=3, size=(200, 300)):
    """Parameters of patches 0 to n - 1, all of one size."""
    return draw_views(np.arange(n), seed=seed, epoch=epoch, recipe=recipe, sizes=np.full((n, 2), size))


def assert_same(ours, theirs, rows=slice(None)):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name)[rows], err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_row_depends_on_its_own_patch_alone(data):
    """Whatever else is in the batch, and in whatever order."""
    sizes = np.random.default_rng(1).integers(1, 400, (200, 2))
    recipe = data.draw(st.sampled_from([FULL, get_recipe("rotnet-jitter")]))
    whole = draw_views(np.arange(200), seed=11, epoch=2, recipe=recipe, sizes=sizes)
    ids = np.array(data.draw(st.lists(st.integers(0, 199), min_size=1, max_size=30)))
    assert_same(draw_views(ids, seed=11, epoch=2, recipe=recipe, sizes=sizes[ids]), whole, ids)


def test_views_epochs_seeds_and_ids_draw_differently():
    drawn = draw(400)
    sizes = np.full((400, 2), (200, 300))
    others = [
        draw(400, epoch=4),
        draw(400, seed=8),
        draw_views(np.arange(400) + 400, seed=7, epoch=3, recipe=SIMCLR, sizes=sizes),
    ]
    columns = [drawn.factors[:, 0], drawn.factors[:, 1], *(other.factors[:, 0] for other in others)]
    for one, two in itertools.combinations(columns, 2):
        assert not np.any(np.all(one == two, axis=1))
        correlation = np.corrcoef(one.T, two.T)[:4, 4:]
        assert np.abs(correlation).max() < 0.2  # 4 standard deviations of chance
    assert np.mean(np.all(drawn.box[:, 0] == drawn.box[:, 1], axis=1)) < 0.01


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    st.integers(0, 2**64 - 1),
    st.sampled_from([SIMCLR, get_recipe("supervised"), get_recipe("eval"), get_recipe("eval-plain")]),
)
def test_box_lies_inside_the_image(sizes, seed, recipe):
    sizes = np.array(sizes)
    box = draw_views(np.arange(len(sizes)), seed=seed, epoch=0, recipe=recipe, sizes=sizes).box
    top, left, height, width = np.moveaxis(box, 2, 0)
    assert (height >= 1).all() and (width >= 1).all()
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= sizes[:, :1]).all() and (left + width <= sizes[:, 1:]).all()


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 1), (0, 0, 1, 1)), ((1, 1000), (0, 499, 1, 1)), ((3000, 30), (1480, 0, 40, 30))]
)
def test_box_of_an_impossible_shape_is_torchvisions_centred_one(size, expected):
    recipe = dataclasses.replace(SIMCLR, crop=RandomCrop(area=(0.9, 1.0)))
    torch.manual_seed(0)
    theirs = RandomResizedCrop(8, scale=(0.9, 1.0)).make_params([torch.zeros(3, *size)])
    box = draw(20, recipe, size=size).box
    assert (box == expected).all()
    if size[0] != 1:  # for a line of one pixel torchvision's box has a fraction of a pixel
        assert tuple(theirs[name] for name in ("top", "left", "height", "width")) == expected


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("eval", (40, 60), (0, 10, 40, 40)),
        ("eval", (61, 40), (10, 0, 40, 40)),
        ("eval-plain", (40, 60), (0, 0, 40, 60)),
        ("eval", (1, 1), (0, 0, 1, 1)),
    ],
)
def test_box_without_crop_is_the_centred_square_or_everything(name, size, expected):
    drawn = draw(3, get_recipe(name), size=size)
    assert (drawn.box == expected).all()
    assert not drawn.flip.any() and not drawn.grey.any() and (drawn.order == -1).all()


# The crop's distribution


def area_and_ratio(box, size):
    height, width = box[..., 2].ravel().astype(float), box[..., 3].ravel().astype(float)
    return height * width / (size[0] * size[1]), width / height


def test_area_share_and_ratio_stay_in_range():
    size = (400, 500)
    area, ratio = area_and_ratio(draw(5000, size=size).box, size)
    assert area.min() >= 0.08 * (1 - 0.01) and area.max() <= 1.0
    assert area.min() < 0.09 and area.max() > 0.97
    assert ratio.min() >= 0.75 * 0.98 and ratio.max() <= 4 / 3 * 1.02
    assert ratio.min() < 0.76 and ratio.max() > 1.31


@pytest.mark.parametrize("size", [(224, 224), (150, 400)])
def test_box_is_distributed_as_torchvisions(size):
    """Means and quartiles of area, ratio and place, within 5 standard errors."""
    n = 2500
    torch.manual_seed(0)
    transform, image = RandomResizedCrop(8), torch.empty(3, *size)
    found = [transform.make_params([image]) for _ in range(n)]
    theirs = np.array([[p[name] for name in ("top", "left", "height", "width")] for p in found])
    ours = draw(2 * n, size=size).box.reshape(-1, 4)
    for values, reference in zip(
        (*area_and_ratio(ours, size), *ours[:, :2].T), (*area_and_ratio(theirs, size), *theirs[:, :2].T), strict=True
    ):
        error = reference.std() * np.sqrt(1 / n + 1 / len(values))
        assert abs(values.mean() - reference.mean()) < 5 * error
        assert abs(values.std() / reference.std() - 1) < 0.08
        for quarter in (0.25, 0.5, 0.75):
            assert (
                abs((values <= np.quantile(reference, quarter)).mean() - (reference <= np.quantile(reference, quarter)).mean())
                < 0.05
            )


# Frequencies and ranges


def test_frequencies():
    """Within 4 standard deviations of 20,000 views."""
    drawn = draw(10_000)
    jittered = drawn.order[..., 0] >= 0
    for share, expected in ((drawn.flip, 0.5), (drawn.grey, 0.2), (jittered, 0.8)):
        assert abs(share.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000)
    assert abs((drawn.grey & drawn.flip & jittered).mean() - 0.5 * 0.2 * 0.8) < 0.008  # independent of each other


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_factors_fill_their_ranges(strength):
    factors = draw(5000, simclr(strength)).factors.reshape(-1, 4).astype(float)
    spread = np.array([0.8, 0.8, 0.8, 0.2]) * strength
    low, high = np.array([1, 1, 1, 0]) - spread, np.array([1, 1, 1, 0]) + spread
    low[:3] = np.maximum(low[:3], 0)
    width = high - low
    assert (factors >= low - 1e-6).all() and (factors <= high + 1e-6).all()
    assert (factors.min(0) < low + 0.01 * width).all() and (factors.max(0) > high - 0.01 * width).all()
    np.testing.assert_array_less(np.abs(factors.mean(0) - (low + high) / 2), 0.02 * width)
    off_diagonal = np.corrcoef(factors.T)[~np.eye(4, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.05  # four draws, not one


def test_all_orders_occur_equally_often():
    order = draw(6000).order.reshape(-1, 4)
    order = order[order[:, 0] >= 0]
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    kinds, counts = np.unique(order, axis=0, return_counts=True)
    assert len(kinds) == 24
    expected = len(order) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 52  # chi-squared with 23 degrees of freedom: p = 0.0005


def test_order_is_all_or_nothing():
    order = draw(2000).order
    assert ((order == -1).all(axis=2) | (order >= 0).all(axis=2)).all()


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"crop": None}, {"box"}),
        ({"flip": 0.0}, {"flip"}),
        ({"vertical_flip": 0.0}, {"vertical"}),
        ({"turns": "none"}, {"turns"}),
        ({"stain": None}, {"stain"}),
        ({"grey": 0.0}, {"grey"}),
        ({"jitter": None}, {"order", "factors"}),
        ({"jitter": ColourJitter(0.35, 0.35, 0.1, 0.1, probability=0.3)}, {"order"}),
        ({"jitter": ColourJitter(0.35, 0.1, 0.1, 0.1)}, {"factors"}),
        ({"blur": None}, {"sigma"}),
    ],
)
def test_changing_one_operation_leaves_the_draws_of_the_others(change, touched):
    before, after = draw(300, FULL), draw(300, dataclasses.replace(FULL, **change))
    changed = {name for name in FIELDS if not np.array_equal(getattr(before, name), getattr(after, name))}
    assert changed == touched


def test_more_views_leave_the_first_ones():
    two, four = draw(50, FULL), draw(50, dataclasses.replace(FULL, views=4))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(four, name)[:, :2], getattr(two, name))


PINNED_BOX = [[[36, 16, 153, 176], [65, 48, 123, 118]], [[6, 5, 89, 74], [43, 53, 44, 47]]]
PINNED_FLIP = [[False, False], [True, False]]
PINNED_ORDER = [[[2, 3, 1, 0], [2, 0, 3, 1]], [[1, 0, 3, 2], [-1, -1, -1, -1]]]


def test_draws_are_those_of_published_runs():
    """Pinned: whoever changes the draws changes the result of every run, and has to say so."""
    drawn = draw_views(np.array([0, 123_456_789]), seed=42, epoch=1, recipe=SIMCLR, sizes=np.array([[224, 224], [96, 128]]))
    assert drawn.box.tolist() == PINNED_BOX
    assert drawn.flip.tolist() == PINNED_FLIP
    assert drawn.order.tolist() == PINNED_ORDER


def test_recipe_without_randomness_ignores_seed_and_epoch():
    assert_same(draw(5, Recipe(), seed=1, epoch=0), draw(5, Recipe(), seed=2, epoch=9))


# First 16 digits of the digest of 300 patches' draws, made before there were flips, turns, stains and blur.
PINNED_DIGESTS = {
    "simclr": "4ef50acf96c0e99b",
    "simclr-mild": "3d13e3bec207b86f",
    "supervised": "a8819c785e98639a",
    "eval": "06dba9abb6231a2b",
    "eval-plain": "f3d810ce9f3fdffd",
}


@pytest.mark.parametrize("name", PINNED_DIGESTS)
def test_draws_of_the_first_recipes_are_what_they_were(name):
    number = np.arange(300)
    sizes = np.stack([40 + number % 500, 60 + number * 7 % 400], axis=1)
    drawn = draw_views(number * 7919, seed=42, epoch=3, recipe=get_recipe(name), sizes=sizes)
    digest = hashlib.sha256()
    for field in ("box", "flip", "order", "factors", "grey"):
        digest.update(np.ascontiguousarray(getattr(drawn, field)).tobytes())
    assert digest.hexdigest()[:16] == PINNED_DIGESTS[name]
    assert not drawn.vertical.any() and not drawn.turns.any() and not drawn.sigma.any()
    assert (drawn.stain == np.array([[1.0], [0.0]])).all()


@pytest.mark.parametrize("name", RECIPES)
def test_shapes_and_types(name):
    recipe = get_recipe(name)
    drawn = draw(5, recipe)
    kinds = {name: (value.shape[2:], value.dtype.name) for name, value in vars(drawn).items()}
    assert all(value.shape[:2] == (5, recipe.views) for value in vars(drawn).values())
    assert kinds == {
        "box": ((4,), "int32"),
        "flip": ((), "bool"),
        "vertical": ((), "bool"),
        "turns": ((), "int8"),
        "stain": ((2, 3), "float32"),
        "order": ((4,), "int8"),
        "factors": ((4,), "float32"),
        "grey": ((), "bool"),
        "sigma": ((), "float32"),
    }


# Turns, stains, blur


def test_flips_and_turns_occur_equally_often_and_independently():
    drawn = draw(8000, FULL)
    kinds = drawn.turns.ravel() * 4 + drawn.vertical.ravel() * 2 + drawn.flip.ravel()
    counts = np.bincount(kinds, minlength=16)
    assert ((counts - 1000) ** 2 / 1000).sum() < 40  # chi-squared with 15 degrees of freedom: p = 0.0005


@pytest.mark.parametrize("strength", [0.05, 0.2])
def test_stains_fill_their_ranges(strength):
    recipe = dataclasses.replace(FULL, stain=StainJitter(strength))
    found = (draw(5000, recipe).stain.reshape(-1, 6) - np.array([1, 1, 1, 0, 0, 0])) / strength
    assert (np.abs(found) <= 1 + 1e-5).all()
    assert (found.min(0) < -0.99).all() and (found.max(0) > 0.99).all()
    assert np.abs(found.mean(0)).max() < 0.03  # 5 standard errors
    assert np.abs(found.std(0) - 1 / np.sqrt(3)).max() < 0.02
    assert np.abs(np.corrcoef(found.T)[~np.eye(6, dtype=bool)]).max() < 0.05


def test_blur_is_drawn_for_its_share_and_over_its_range():
    sigma = draw(5000, get_recipe("simclr-blur")).sigma.ravel()
    blurred = sigma[sigma > 0]
    assert abs(len(blurred) / len(sigma) - 0.5) < 4 * 0.5 / np.sqrt(len(sigma))
    assert 0.1 <= blurred.min() < 0.11 and 1.99 < blurred.max() <= 2
    assert np.abs(np.quantile(blurred, (0.25, 0.5, 0.75)) - (0.575, 1.05, 1.525)).max() < 0.06


@pytest.mark.parametrize("name", ["rotnet", "rotnet-jitter"])
def test_rotnets_views_share_box_and_flip_and_are_turned_by_their_number(name):
    drawn = draw(400, get_recipe(name))
    for view in range(4):
        np.testing.assert_array_equal(drawn.box[:, view], drawn.box[:, 0])
        np.testing.assert_array_equal(drawn.flip[:, view], drawn.flip[:, 0])
        assert (drawn.turns[:, view] == get_recipe(name).view_labels[view]).all()
    assert 0.4 < drawn.flip.mean() < 0.6 and len(np.unique(drawn.box[:, 0], axis=0)) > 390
    if name == "rotnet-jitter":
        for one, two in itertools.combinations(range(4), 2):
            assert not np.any(np.all(drawn.factors[:, one] == drawn.factors[:, two], axis=1))
