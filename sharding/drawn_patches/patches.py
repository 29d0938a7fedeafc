"""Patches of an organ: what tissue its classes have, and the slides' stains.

`breast` has three classes, `benign`, `in_situ` and `invasive`. They differ in how large, how even and how long their nuclei
are, in how closely these lie, and in how they are arranged. Every patch departs from its class in each of these, so the classes
overlap. `kidney` has no labels: nuclei of all these kinds, in tubules and glomeruli. Every slide has its own stain, so colour
says more of the slide than of the class.
"""

import dataclasses
import io
import unicodedata

import numpy as np
import PIL.Image

from sharding.drawn_patches.random_fields import noise, sparse_points
from sharding.drawn_patches.tissue import Nuclei, Tissue

CLASSES = {"benign": 0.5, "in_situ": 0.3, "invasive": 0.2}  # share of the patches
ORGANS = ("breast", "kidney")

# Optical density per unit of stain in R, G, B. Source: Macenko et al., "A method for normalizing histology slides for
# quantitative analysis", ISBI 2009, the reference vectors of the authors' code.
_STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
_NUCLEI = {
    "benign": Nuclei(3.6, 0.07, 1.12, 0.03, 1.30, 0.26, 0.05),
    "in_situ": Nuclei(4.7, 0.13, 1.30, 0.06, 1.15, 0.30, 0.25),
    "invasive": Nuclei(6.1, 0.22, 1.65, 0.12, 1.26, 0.34, 0.55),
}
# How often a class shows an architecture: round ducts with a lumen, filled ducts, cords and nests without order.
_ARCHITECTURES = ("open", "filled", "cords")
_ARCHITECTURE_SHARES = {"benign": (0.76, 0.14, 0.1), "in_situ": (0.14, 0.74, 0.12), "invasive": (0.08, 0.14, 0.78)}


def draw_patch(organ: str, kind: str | None, *, index: int, slide: int, size: int, seed: int) -> np.ndarray:
    """One patch: (size, size, 3) uint8 RGB.

    organ: breast or kidney; kind: a breast patch's class, None for kidney; index, slide: the patch's and slide's numbers.
    """
    rng = _generator(seed, organ, "patch", index)
    h_SS, e_SS = _breast(rng, size, kind) if organ == "breast" else _kidney(rng, size)
    return _stained(rng, h_SS, e_SS, _generator(seed, organ, "slide", slide))


def patch_classes(patches: int, seed: int) -> list[str]:
    """The class of every `breast` patch, in order of their numbers: shuffled, with shares as near CLASSES' as can be."""
    bounds = np.rint(np.cumsum([0.0, *CLASSES.values()]) * patches).astype(int)
    classes = np.repeat(np.arange(len(CLASSES)), np.diff(bounds))
    return [list(CLASSES)[c] for c in classes[np.argsort(_generator(seed, "breast", "classes", 0).random(patches))]]


def slide_name(organ: str, slide: int) -> str:
    """The folder name of a slide (from 0). Every third one has a blank and Korean letters, as names of real scans do."""
    if slide % 3 == 2:
        return unicodedata.normalize("NFC", f"환자 {slide + 1:02d}")
    return f"{organ[:2].upper()}-{slide + 1:03d}"


def encode(patch: np.ndarray) -> bytes:
    """JPEG of quality 95 with full-resolution colour (4:4:4)."""
    file = io.BytesIO()
    PIL.Image.fromarray(patch).save(file, "jpeg", quality=95, subsampling=0)
    return file.getvalue()


def _breast(rng, size, kind):
    base = _NUCLEI[kind]
    nuclei = Nuclei(
        radius=base.radius * rng.lognormal(0, 0.07),
        radius_spread=base.radius_spread * rng.lognormal(0, 0.3),
        elongation=1 + (base.elongation - 1) * rng.lognormal(0, 0.3),
        irregularity=base.irregularity * rng.lognormal(0, 0.3),
        gap=base.gap * rng.lognormal(0, 0.06),
        clumping=base.clumping * rng.lognormal(0, 0.2),
        nucleolus=base.nucleolus * rng.uniform(0.3, 1.6),
    )
    architecture = _ARCHITECTURES[np.searchsorted(np.cumsum(_ARCHITECTURE_SHARES[kind]), rng.random() * 0.999)]
    tissue = Tissue(rng, size)
    # Drawn without regard to the class: how much of the patch is epithelium decides its mean colour.
    cover = rng.uniform(0.35, 0.8)
    if architecture == "cords":
        field = noise(rng, size, size / 26) + 0.5 * noise(rng, size, size / 12)
        tissue.add_epithelium(np.quantile(field, 1 - cover) - field, softness=0.12)
    else:
        hole = rng.uniform(0.3, 0.55) if architecture == "open" else rng.choice([0.0, 0.0, 0.22])
        radius = np.sqrt(cover / (1 - 0.8 * hole**2)) * rng.uniform(26, 42)
        for centre in sparse_points(rng, size, 2.0 * radius, radius * 0.4):
            tissue.add_round(centre, radius * rng.uniform(0.8, 1.1), hole)
    tissue.add_nuclei(nuclei)
    return tissue.finish()


def _kidney(rng, size):
    share = rng.random()  # between the mildest and the most atypical of nuclei, so that all kinds are seen
    low, high = _NUCLEI["benign"], _NUCLEI["invasive"]
    values = {}
    for field in dataclasses.fields(Nuclei):
        a, b = getattr(low, field.name), getattr(high, field.name)
        values[field.name] = (a + (b - a) * share) * rng.lognormal(0, 0.06)
    values["gap"] = rng.uniform(1.15, 1.7)
    nuclei = Nuclei(**values)
    tissue = Tissue(rng, size)
    centres = sparse_points(rng, size, 40.0, 16.0)
    glomerulus = rng.integers(len(centres)) if len(centres) and rng.random() < 0.3 else -1
    for i, centre in enumerate(centres):
        if i == glomerulus:
            radius = rng.uniform(24, 32)
            tissue.clear(centre, radius * 1.2)
            tissue.add_round(centre, radius, 0.0)
        else:
            tissue.add_round(centre, rng.uniform(15, 23), rng.uniform(0.25, 0.5))
    tissue.add_nuclei(nuclei)
    return tissue.finish()


def _stained(rng, h_SS, e_SS, slide_rng):
    """Light through the stains, after Beer and Lambert, with the slide's stain and the patch's thickness."""
    stains = np.stack([_rotated(slide_rng, stain, degrees=5) for stain in _STAINS])
    amounts = slide_rng.lognormal(0, 0.2, 2) * (0.85, 0.95) * rng.lognormal(0, 0.1, 2)
    background = 243 + slide_rng.uniform(-9, 8, 3)
    thickness = rng.lognormal(0, 0.14)
    density = thickness * (h_SS[..., None] * (amounts[0] * stains[0]) + e_SS[..., None] * (amounts[1] * stains[1]))
    density = density + 0.012 * rng.standard_normal(density.shape, dtype=np.float32)
    return np.clip(np.rint(background * np.exp(-density)), 0, 255).astype(np.uint8)


def _rotated(rng, stain, degrees):
    """The stain's vector turned by a random angle of that deviation in a random direction, without negative parts."""
    unit = stain / np.linalg.norm(stain)
    aside = rng.standard_normal(3)
    aside -= (aside @ unit) * unit
    angle = np.radians(degrees) * rng.standard_normal()
    turned = np.cos(angle) * unit + np.sin(angle) * aside / np.linalg.norm(aside)
    return np.maximum(turned, 0.02) * np.linalg.norm(stain)


def _generator(seed, organ, purpose, number):
    """NumPy's generator for one purpose. Unlike the draws of a run, these need not outlive a NumPy release: bytes are kept."""
    return np.random.Generator(np.random.PCG64([seed, ORGANS.index(organ), ("classes", "slide", "patch").index(purpose), number]))
