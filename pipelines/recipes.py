"""Augmentation recipes as data: frozen dataclasses, listed in RECIPES by the names that users type.

A new operation is a field here, its draws in `views`, and its pixels in `view_kernels_numba` and `view_kernels_torch`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Optical density in red, green and blue of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001; scikit-image's rgb_from_hed).
RGB_FROM_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
# One level: darker values are noise, whose logarithm would shift the other colours of the pixel.
DARKEST = 1 / 255


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
class StainJitter:
    """Jitter of haematoxylin, eosin and DAB (Tellez et al. 2018, "Whole-slide mitosis detection in H&E breast histology").

    Each stain's optical density is multiplied by a factor uniform in [1 - strength, 1 + strength], and a number uniform in
    [-strength, strength] is added. The density is -log10 of the transmitted share of light (Ruifrok & Johnston 2001).
    """

    strength: float


@dataclass(frozen=True)
class GaussianBlur:
    """Blur by a Gaussian of a random width (Chen et al. 2020, appendix A).

    sigma: pixels of the view, uniform; kernel: size of the window in percent of the view's side, 1 to 100, made odd.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: int = 10
    probability: float = 0.5


def kernel_size(side: int, percent: int) -> int:
    """Taps of the blur for a view's side in pixels: odd, and few enough that the reflected border fits the view."""
    return side * percent // 100 // 2 * 2 + 1


@dataclass(frozen=True)
class Recipe:
    """How a patch becomes views. Without `crop` the box is fixed: the centred square, or the whole patch (`keep_aspect` False).

    Operations apply in the order of the fields: the box is resized, mirrored left and right (`flip`), then top and bottom,
    turned counter-clockwise, stained, its colours jittered, made grey, blurred, normalised.
    turns: by a random number of quarter turns ("random"); or "by view": all views have one box and one flip, and view k is
    turned by k quarter turns (Gidaris et al. 2018, RotNet).
    """

    views: int = 1
    crop: RandomCrop | None = None
    keep_aspect: bool = True
    flip: float = 0.0
    vertical_flip: float = 0.0
    turns: Literal["none", "random", "by view"] = "none"
    stain: StainJitter | None = None
    jitter: ColourJitter | None = None
    grey: float = 0.0
    blur: GaussianBlur | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def is_random(self) -> bool:
        moved = self.crop is not None or self.flip > 0 or self.vertical_flip > 0 or self.turns == "random"
        return moved or self.has_colour or self.blur is not None

    @property
    def has_colour(self) -> bool:
        """Whether a view's colours may differ from its patch's."""
        return self.stain is not None or self.jitter is not None or self.grey > 0

    @property
    def view_labels(self) -> tuple[int, ...] | None:
        """Each view's label for a rotation task: its number of quarter turns if `turns` is "by view", else None."""
        return tuple(view % 4 for view in range(self.views)) if self.turns == "by view" else None


def simclr(strength: float = 1.0, area: float = 0.08) -> Recipe:
    """The augmentation of Chen et al. 2020 (SimCLR, appendix A) without blur.

    strength: s, of the colour jitter; area: the smallest crop, as a share of the image.
    """
    s = strength
    jitter = ColourJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, probability=0.8)
    return Recipe(views=2, crop=RandomCrop(area=(area, 1.0)), flip=0.5, jitter=jitter, grey=0.2)


def pathology(stain: float = 0.05, area: float = 0.2) -> Recipe:
    """For stained tissue, which has no preferred orientation, and whose colours come from a few stains.

    The stain's strength 0.05 is the "HED-light" of Tellez et al. 2019 ("Quantifying the effects of data augmentation and stain
    color normalization", Medical Image Analysis 58); brightness in 0.65 to 1.35 is what goes with it there, contrast is kept to
    the same range, and saturation and hue to the 0.1 of its "HSV-light".
    """
    jitter = ColourJitter(0.35, 0.35, 0.1, 0.1, probability=0.8)
    crop = RandomCrop(area=(area, 1.0))
    return Recipe(views=2, crop=crop, flip=0.5, vertical_flip=0.5, turns="random", stain=StainJitter(stain), jitter=jitter)


def rotnet(jitter: ColourJitter | None = None) -> Recipe:
    """Four views, one for each quarter turn (Gidaris et al. 2018); with `jitter`, each view has its own colour jitter."""
    return Recipe(views=4, crop=RandomCrop(area=(0.5, 1.0)), flip=0.5, turns="by view", jitter=jitter)


RECIPES = {
    "simclr": simclr(),
    "simclr-blur": dataclasses.replace(simclr(), blur=GaussianBlur()),
    # For small patches, where a crop of 8 % holds a nucleus or two, and for short runs.
    "simclr-mild": simclr(strength=0.5, area=0.3),
    "pathology": pathology(),
    "rotnet": rotnet(),
    # The jitter of Chen et al. 2020b (MoCo v2), so that colours at the border do not reveal the rotation.
    "rotnet-jitter": rotnet(ColourJitter(0.4, 0.4, 0.4, 0.1, probability=0.8)),
    "supervised": Recipe(crop=RandomCrop(area=(0.5, 1.0)), flip=0.5),
    "eval": Recipe(),
    "eval-plain": Recipe(keep_aspect=False),
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError for an unknown one, naming the known ones."""
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


# Fields that every description contains, because they existed before descriptions left out defaults. Do not add to them.
_ALWAYS_DESCRIBED = {
    Recipe: ["views", "crop", "keep_aspect", "flip", "vertical_flip", "turns", "stain", "jitter", "grey", "blur", "mean", "std"],
    RandomCrop: ["area", "ratio"],
    ColourJitter: ["brightness", "contrast", "saturation", "hue", "probability"],
    StainJitter: ["strength"],
    GaussianBlur: ["sigma", "kernel", "probability"],
}


def describe_recipe(recipe: Recipe) -> dict:
    """The recipe as plain data, for run records, model cards and the keys of cached features.

    A field that is added later appears only where it differs from its default. So a new operation changes neither the
    description nor the keys of recipes without it, and a default must never change.
    """
    return _describe(recipe)


def _describe(value):
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
    always = _ALWAYS_DESCRIBED.get(type(value), [])
    return {field.name: _describe(own) for field, own in fields.items() if field.name in always or own != field.default}
