"""Recipes by name, and what they say of themselves."""

import dataclasses
import json

import pytest

from pipelines.recipes import (
    RECIPES,
    ColourJitter,
    GaussianBlur,
    RandomCrop,
    Recipe,
    StainJitter,
    describe_recipe,
    get_recipe,
    kernel_size,
    simclr,
)


def test_simclr_is_that_of_the_paper():
    """Chen et al. 2020, appendix A, but for the blur: strength 1, p 0.8, hue 0.2; grey 0.2; flip 0.5."""
    recipe = get_recipe("simclr")
    assert (recipe.views, recipe.flip, recipe.grey) == (2, 0.5, 0.2)
    assert recipe.crop == RandomCrop(area=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    assert recipe.jitter == ColourJitter(0.8, 0.8, 0.8, 0.2, probability=0.8)
    assert get_recipe("simclr-mild") == simclr(strength=0.5, area=0.3)
    assert simclr(area=0.3).crop == RandomCrop(area=(0.3, 1.0))
    assert simclr(0.5).jitter == ColourJitter(0.4, 0.4, 0.4, 0.1, probability=0.8)


def test_evaluation_is_not_random():
    assert [name for name, recipe in RECIPES.items() if not recipe.is_random] == ["eval", "eval-plain"]
    assert all(get_recipe(name).views == 1 for name in ("eval", "eval-plain", "supervised"))


def test_blur_is_that_of_the_paper():
    """Chen et al. 2020, appendix A: half of the views, a kernel of 10 % of the side, sigma from 0.1 to 2; all else as simclr."""
    recipe = get_recipe("simclr-blur")
    assert dataclasses.replace(recipe, blur=None) == get_recipe("simclr")
    assert recipe.blur == GaussianBlur(sigma=(0.1, 2.0), kernel=10, probability=0.5)
    assert [kernel_size(side, 10) for side in (1, 19, 20, 96, 224, 299)] == [1, 1, 3, 9, 23, 29]
    for side in range(1, 50):
        assert kernel_size(side, 100) % 2 == 1 and kernel_size(side, 100) // 2 < side  # what a reflected border may be


def test_pathology_turns_mirrors_and_stains():
    recipe = get_recipe("pathology")
    assert (recipe.views, recipe.flip, recipe.vertical_flip, recipe.turns, recipe.grey) == (2, 0.5, 0.5, "random", 0.0)
    assert recipe.crop == RandomCrop(area=(0.2, 1.0)) and recipe.stain == StainJitter(0.05)


def test_only_rotnet_tells_its_views():
    labels = {name: recipe.view_labels for name, recipe in RECIPES.items() if recipe.view_labels is not None}
    assert labels == {"rotnet": (0, 1, 2, 3), "rotnet-jitter": (0, 1, 2, 3)}
    plain, jittered = get_recipe("rotnet"), get_recipe("rotnet-jitter")
    assert plain.jitter is None and dataclasses.replace(jittered, jitter=None) == plain


@pytest.mark.parametrize(
    ("recipe", "is_random", "has_colour"),
    [
        (Recipe(), False, False),
        (Recipe(crop=RandomCrop()), True, False),
        (Recipe(flip=0.5), True, False),
        (Recipe(vertical_flip=0.5), True, False),
        (Recipe(turns="random"), True, False),
        (Recipe(turns="by view", views=4), False, False),
        (Recipe(stain=StainJitter(0.1)), True, True),
        (Recipe(grey=0.2), True, True),
        (Recipe(jitter=ColourJitter(0.1, 0.1, 0.1, 0.1)), True, True),
        (Recipe(blur=GaussianBlur()), True, False),
    ],
)
def test_what_is_random(recipe, is_random, has_colour):
    assert (recipe.is_random, recipe.has_colour) == (is_random, has_colour)


def test_description_is_plain_data_and_tells_recipes_apart():
    texts = [json.dumps(describe_recipe(recipe), sort_keys=True) for recipe in (*RECIPES.values(), simclr(0.7))]
    assert len(set(texts)) == len(texts)
    assert json.loads(texts[0])["jitter"]["hue"] == RECIPES["simclr"].jitter.hue
    assert set(json.loads(texts[0])) == {field.name for field in dataclasses.fields(Recipe)}


def test_unknown_recipe_is_told_those_that_there_are():
    with pytest.raises(ValueError, match=f"'simclr2': choose one of {', '.join(RECIPES)}"):
        get_recipe("simclr2")
