"""What may be random in a view, as data: a recipe is a frozen dataclass, and its name is what a user types.

A new augmentation operation is a field here, its draws in `views`, and its pixels in `colour` or `graph`.
"""

import dataclasses
from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class RandomCrop:
    """RandomResizedCrop: a box of a random share of the image's area and a random aspect ratio (Szegedy et al. 2015)."""

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast, saturation and hue in a random order (Chen et al. 2020, appendix A).

    The first three factors are uniform in [max(0, 1 - x), 1 + x]; hue turns by a uniform share of the circle in [-x, x].
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    probability: float = 0.8


@dataclass(frozen=True)
class Recipe:
    """How a patch becomes views. Without `crop` the box is fixed: the centred square, or all of it (`keep_aspect` False)."""

    views: int = 1
    crop: RandomCrop | None = None
    keep_aspect: bool = True
    flip: float = 0.0
    jitter: ColourJitter | None = None
    grey: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def is_random(self) -> bool:
        return self.crop is not None or self.flip > 0 or self.has_colour

    @property
    def has_colour(self) -> bool:
        """Whether a view's colours may differ from its patch's."""
        return self.jitter is not None or self.grey > 0


def simclr(strength: float = 1.0, area: float = 0.08) -> Recipe:
    """The augmentation of Chen et al. 2020 (SimCLR, appendix A) without blur.

    strength: s, of the colour jitter; area: the smallest crop, as a share of the image.
    """
    s = strength
    jitter = ColourJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, probability=0.8)
    return Recipe(views=2, crop=RandomCrop(area=(area, 1.0)), flip=0.5, jitter=jitter, grey=0.2)


RECIPES = {
    "simclr": simclr(),
    # For small patches, where a crop of 8 % holds a nucleus or two, and for short runs.
    "simclr-mild": simclr(strength=0.5, area=0.3),
    "supervised": Recipe(crop=RandomCrop(area=(0.5, 1.0)), flip=0.5),
    "eval": Recipe(),
    "eval-plain": Recipe(keep_aspect=False),
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError for an unknown one, and names those that there are."""
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def describe_recipe(recipe: Recipe) -> dict:
    """The recipe as plain data, for run records and model cards."""
    return dataclasses.asdict(recipe)
