"""Recipes by name, and what they say of themselves."""

import dataclasses
import json

import pytest

from pipelines.recipes import RECIPES, ColourJitter, RandomCrop, Recipe, describe_recipe, get_recipe, simclr


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


@pytest.mark.parametrize(
    ("recipe", "is_random", "has_colour"),
    [
        (Recipe(), False, False),
        (Recipe(crop=RandomCrop()), True, False),
        (Recipe(flip=0.5), True, False),
        (Recipe(grey=0.2), True, True),
        (Recipe(jitter=ColourJitter(0.1, 0.1, 0.1, 0.1)), True, True),
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
