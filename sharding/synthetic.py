"""Drawn patches in the look of haematoxylin and eosin: something to try the whole path on, with no download and no patient.

    python sharding/synthetic.py --out DIR --organ breast --patches 1200 --size 96 --slides 12 --seed 7

`breast` has three classes, `benign`, `in_situ` and `invasive`, in `{class}/{slide}/{name}.jpg`. They differ in how large, how
even and how long their nuclei are, in how closely these lie, and in how they are arranged; every patch departs from its
class in each of these, so that the classes overlap. `kidney` has no labels, `{slide}/{name}.jpg`: nuclei of all these kinds,
in tubules and glomeruli. Every slide of both has its own stain, so that colour says more of the slide than of the class.

Every patch is a function of (seed, organ, its number, size) and of its class and slide.
"""

import dataclasses
import functools
import io
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from sharding.cli import option, required, run_script
from sharding.process_pool import ordered_map, tick

CLASSES = {"benign": 0.5, "in_situ": 0.3, "invasive": 0.2}  # share of the patches
ORGANS = ("breast", "kidney")
LAYOUTS = {"breast": "{class}/{slide}/{name}", "kidney": "{slide}/{name}"}

# Optical density per unit of stain in R, G, B. Source: Macenko et al., "A method for normalizing histology slides for
# quantitative analysis", ISBI 2009, the reference vectors of the authors' code.
_STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
_MARKER = ".synthetic.json"  # hidden, so that no layout takes it for a patch
_VERSION = 1  # of the drawing: raise it when the same arguments give other patches
_PATCHES_PER_TASK = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """What is drawn, and where to."""

    out: str = required("the folder to make, with the drawn images in it")
    organ: str = option("breast", "breast (three classes) or kidney (no labels)")
    patches: int = option(1200, "patches to draw")
    size: int = option(96, "side of a patch in pixels, 32 to 1024; nuclei keep their size, 7 to 15 px")
    slides: int = option(12, "slides, each with its own stain")
    seed: int = option(7, "whole number; equal arguments draw equal bytes")
    workers: int = option(2, "processes; the patches do not depend on it")


@dataclasses.dataclass(frozen=True)
class Nuclei:
    """What the nuclei of an epithelium look like. Lengths in pixels."""

    radius: float
    radius_spread: float  # standard deviation within a patch, as a share of the radius
    elongation: float  # long over short axis, mean
    irregularity: float  # of the outline, as a share of the radius
    gap: float  # between neighbours' centres, as a multiple of the two radii's sum
    clumping: float  # contrast of the chromatin
    nucleolus: float  # share of nuclei that show one


_NUCLEI = {
    "benign": Nuclei(3.6, 0.07, 1.12, 0.03, 1.30, 0.26, 0.05),
    "in_situ": Nuclei(4.7, 0.13, 1.30, 0.06, 1.15, 0.30, 0.25),
    "invasive": Nuclei(6.1, 0.22, 1.65, 0.12, 1.26, 0.34, 0.55),
}
# How often a class shows an architecture: round ducts with a lumen, filled ducts, cords and nests without order.
_ARCHITECTURES = ("open", "filled", "cords")
_ARCHITECTURE_SHARES = {"benign": (0.76, 0.14, 0.1), "in_situ": (0.14, 0.74, 0.12), "invasive": (0.08, 0.14, 0.78)}


def draw_set(config: Config) -> Path:
    """Draw a set of patches into a folder, which appears whole or not at all. Returns the folder.

    A folder that holds the same set is left as it is. Raises ValueError when an argument is out of its range, and when the
    folder exists with anything else in it.
    """
    _check(config)
    out = Path(config.out)
    arguments = {"version": _VERSION} | {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "workers")}
    if out.exists():
        if _read_marker(out) != arguments:
            raise ValueError(f"{out} exists and holds something else: give another --out, or remove it first")
        return out
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        tasks = [
            range(start, min(start + _PATCHES_PER_TASK, config.patches)) for start in range(0, config.patches, _PATCHES_PER_TASK)
        ]
        draw = functools.partial(_draw_files, config, partial)
        for _ in ordered_map(draw, tasks, workers=config.workers, total=config.patches, title=f"drawing {config.organ}"):
            pass
        (partial / _MARKER).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


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


def draw_patch(organ: str, kind: str | None, *, index: int, slide: int, size: int, seed: int) -> np.ndarray:
    """One patch: (size, size, 3) uint8 RGB.

    organ: breast or kidney; kind: a breast patch's class, None for kidney; index, slide: the patch's and slide's numbers.
    """
    rng = _generator(seed, organ, "patch", index)
    h_SS, e_SS = _breast(rng, size, kind) if organ == "breast" else _kidney(rng, size)
    return _stained(rng, h_SS, e_SS, _generator(seed, organ, "slide", slide))


def encode(patch: np.ndarray) -> bytes:
    """JPEG of quality 95 with full-resolution colour (4:4:4)."""
    file = io.BytesIO()
    PIL.Image.fromarray(patch).save(file, "jpeg", quality=95, subsampling=0)
    return file.getvalue()


def main(config: Config) -> None:
    there = os.path.exists(config.out)
    out = draw_set(config)
    layout = LAYOUTS[config.organ]
    print(f"{out}: {config.patches:,} {config.organ} patches {'are there already' if there else 'drawn'}, --layout '{layout}'")


# ---- The tissue: amounts of haematoxylin (h) and eosin (e) per pixel, about 0 to 2. Shapes: S side of the patch, n nuclei. ----


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
    tissue = _Tissue(rng, size)
    # Drawn without regard to the class: how much of the patch is epithelium decides its mean colour.
    cover = rng.uniform(0.35, 0.8)
    if architecture == "cords":
        field = _noise(rng, size, size / 26) + 0.5 * _noise(rng, size, size / 12)
        tissue.add_epithelium(np.quantile(field, 1 - cover) - field, softness=0.12)
    else:
        hole = rng.uniform(0.3, 0.55) if architecture == "open" else rng.choice([0.0, 0.0, 0.22])
        radius = np.sqrt(cover / (1 - 0.8 * hole**2)) * rng.uniform(26, 42)
        for centre in _spread(rng, size, 2.0 * radius, radius * 0.4):
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
    tissue = _Tissue(rng, size)
    centres = _spread(rng, size, 40.0, 16.0)
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


class _Tissue:
    """A patch while it is drawn: the stroma first, then epithelium over it, then nuclei."""

    def __init__(self, rng, size):
        self.rng, self.size = rng, size
        self.y_SS, self.x_SS = np.mgrid[:size, :size].astype(np.float32)
        self.epithelium_SS = np.zeros((size, size), np.float32)  # 0 to 1
        self.void_SS = np.zeros((size, size), np.float32)  # 0 to 1: lumens and clefts, where light passes
        self.warp_SS = _noise(rng, size, size / 18)  # makes circles look grown
        self.angle = rng.uniform(0, np.pi)  # of the fibres
        self.nuclei: list[tuple[np.ndarray, np.ndarray]] = []
        self.h_SS = np.zeros((size, size), np.float32)
        self.n_SS = np.zeros((size, size), np.float32)  # 0 to 1: nucleus

    def _distance(self, centre, radius):
        return np.hypot(self.y_SS - centre[0], self.x_SS - centre[1]) + 0.1 * radius * self.warp_SS

    def add_round(self, centre, radius, hole):
        """A duct, tubule or nest: a disc of epithelium with a hole of that share of its radius."""
        distance_SS = self._distance(centre, radius)
        disc_SS = _edge(radius - distance_SS, 0.8)
        if hole > 0:
            hole_SS = _edge(hole * radius - distance_SS, 0.8)
            disc_SS, self.void_SS = disc_SS - hole_SS, np.maximum(self.void_SS, hole_SS)
        self.void_SS = self.void_SS * (1 - np.maximum(disc_SS, 0))
        self.epithelium_SS = np.maximum(self.epithelium_SS, disc_SS) * (1 - self.void_SS)

    def add_epithelium(self, depth_SS, softness):
        """Epithelium where the depth is negative."""
        self.epithelium_SS = np.maximum(self.epithelium_SS, _edge(-depth_SS, softness))

    def clear(self, centre, radius):
        """An empty disc."""
        disc_SS = _edge(radius - self._distance(centre, radius), 0.8)
        self.void_SS = np.maximum(self.void_SS, disc_SS)
        self.epithelium_SS *= 1 - disc_SS

    def add_nuclei(self, nuclei):
        """The epithelium's, then those of the stroma: spindles along the fibres, and some round lymphocytes."""
        rng = self.rng
        pitch = 2 * nuclei.radius * nuclei.gap
        centres = _scatter(rng, self.size, pitch, self.epithelium_SS > 0.6)
        n = len(centres)
        self._draw(
            centres,
            radius=nuclei.radius * np.exp(nuclei.radius_spread * rng.standard_normal(n)),
            elongation=1 + (nuclei.elongation - 1) * rng.lognormal(0, 0.4, n),
            angle=rng.uniform(0, np.pi, n),
            irregularity=nuclei.irregularity,
            clumping=nuclei.clumping,
            nucleolus=rng.random(n) < nuclei.nucleolus,
            depth=rng.uniform(0.85, 1.2) * rng.lognormal(0, 0.12, n),
        )
        stroma = (self.epithelium_SS < 0.2) & (self.void_SS < 0.2)
        for count, radius, elongation in ((rng.uniform(0.3, 1.2), 3.0, 3.0), (rng.gamma(0.6) * 1.2, 3.4, 1.08)):
            spots = _scatter(rng, self.size, 9.0, stroma)
            spots = spots[: rng.poisson(count * stroma.sum() / 700)]
            n = len(spots)
            self._draw(
                spots,
                radius=radius * rng.lognormal(0, 0.1, n),
                elongation=elongation * rng.lognormal(0, 0.15, n),
                angle=self.angle + 0.25 * rng.standard_normal(n),
                irregularity=0.03,
                clumping=0.2,
                nucleolus=np.zeros(n, bool),
                depth=1.25 * rng.lognormal(0, 0.1, n),
            )

    def _draw(self, centres, *, radius, elongation, angle, irregularity, clumping, nucleolus, depth):
        """Nuclei of area pi radius**2 into windows around their centres, all at once, then onto the patch."""
        n, rng = len(centres), self.rng
        if not n:
            return
        long, short = radius * np.sqrt(elongation), radius / np.sqrt(elongation)
        half = int(np.ceil(min((long * (1 + 2 * irregularity)).max() + 2, self.size / 2)))
        corner = np.floor(centres).astype(int) - half
        ticks = np.arange(2 * half + 1)
        dy = (corner[:, 0, None] + ticks - centres[:, 0, None]).astype(np.float32)[:, :, None]  # (n, window, 1)
        dx = (corner[:, 1, None] + ticks - centres[:, 1, None]).astype(np.float32)[:, None, :]

        def each(value):
            return np.broadcast_to(np.asarray(value, np.float32), n)[:, None, None]

        cos, sin = each(np.cos(angle)), each(np.sin(angle))
        u = (dx * cos + dy * sin) / each(long)
        v = (dy * cos - dx * sin) / each(short)
        rho = np.sqrt(u * u + v * v) + np.float32(1e-6)
        # An outline of a few waves. cos and sin of multiples of the angle by De Moivre: no slow functions per pixel.
        c1, s1 = u / rho, v / rho
        ck, sk = c1, s1
        outline = np.ones_like(rho)
        for k in (2, 3, 4, 5):
            ck, sk = ck * c1 - sk * s1, sk * c1 + ck * s1
            a, b = rng.standard_normal((2, n)) * irregularity * 1.4 / np.sqrt(k)
            outline += each(a) * ck + each(b) * sk
        np.maximum(outline, 0.5, out=outline)
        inside = rho / outline
        mask = _edge(each(short) * (1 - inside), 0.45)
        chromatin = each(depth) * (0.82 + 0.3 * np.exp(-(((inside - 0.86) / 0.14) ** 2)))  # a darker membrane
        spot_y, spot_x = (rng.uniform(-0.3, 0.3, (2, n)) * short).astype(np.float32)
        spots = np.exp(-((dy - each(spot_y)) ** 2 + (dx - each(spot_x)) ** 2) / np.float32(1.6))
        chromatin = chromatin + each(0.6 * nucleolus) * spots - each(0.12 * nucleolus)  # pale around its nucleolus
        grain = _noise(rng, self.size, self.size / 2.2)
        for i in range(n):
            (y0, x0), width = corner[i], 2 * half + 1
            ys, xs = slice(max(y0, 0), min(y0 + width, self.size)), slice(max(x0, 0), min(x0 + width, self.size))
            window = slice(ys.start - y0, ys.stop - y0), slice(xs.start - x0, xs.stop - x0)
            if ys.start >= ys.stop or xs.start >= xs.stop:
                continue
            m = mask[i][window]
            value = chromatin[i][window] * (1 + clumping * grain[ys, xs])
            self.h_SS[ys, xs] += m * (value - self.h_SS[ys, xs])
            self.n_SS[ys, xs] = np.maximum(self.n_SS[ys, xs], m)

    def finish(self):
        """(h, e): everything put together."""
        rng, size = self.rng, self.size
        # Stroma: wavy fibres, some of them parted by clefts.
        along = self.x_SS * np.sin(self.angle) - self.y_SS * np.cos(self.angle)
        bend = _noise(rng, size, size / 30) * 7
        streak = _noise(rng, size, size / 6)
        fibres = np.sin((along + bend) * (2 * np.pi / rng.uniform(6, 10)) + 1.4 * streak)
        cleft = _edge(-fibres - rng.uniform(0.85, 1.3) + 0.35 * _noise(rng, size, size / 14), 0.1)
        grain, cloud = _noise(rng, size, size / 2), _noise(rng, size, size / 24)
        stroma = 0.55 + 0.13 * fibres + 0.06 * grain + 0.1 * cloud
        cytoplasm = rng.uniform(0.36, 0.5) + 0.05 * grain + 0.07 * cloud + 0.05 * streak
        epithelium = self.epithelium_SS
        e = epithelium * cytoplasm + (1 - epithelium) * stroma
        h = epithelium * (rng.uniform(0.1, 0.22) + 0.04 * grain) + (1 - epithelium) * 0.05
        void = np.maximum(self.void_SS, (1 - epithelium) * cleft) * (1 - self.n_SS)
        e, h = e * (1 - 0.95 * void), h * (1 - 0.95 * void)
        e = e * (1 - 0.65 * self.n_SS)
        h = h * (1 - self.n_SS) + self.h_SS * 1.25
        return np.maximum(h, 0), np.maximum(e, 0)


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


# ---- Pieces ----


def _edge(x, softness):
    """0 to 1 where x goes from negative to positive, over about 4 times the softness."""
    return (0.5 + 0.5 * np.tanh(np.asarray(x, np.float32) / np.float32(2 * softness))).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _interpolation(size, knots):
    """The knot before each of (size,) points, and how far it is on the (smooth, cosine) way to the next."""
    position = np.linspace(0, knots - 1.001, size)
    before = np.floor(position).astype(int)
    return before, (0.5 - 0.5 * np.cos(np.pi * (position - before))).astype(np.float32)


def _noise(rng, size, cells):
    """(size, size) smooth noise with mean 0 and deviation about 0.7, with that many waves along a side."""
    # No matrix products: the threads that NumPy starts for them stand in each other's way when several processes draw.
    knots = max(2, round(cells) + 1)
    before, part = _interpolation(size, knots)
    noise = rng.standard_normal((knots, knots), dtype=np.float32)
    noise = noise[before] + part[:, None] * (noise[before + 1] - noise[before])
    return noise[:, before] + part * (noise[:, before + 1] - noise[:, before])


def _scatter(rng, size, pitch, allowed_SS):
    """(n, 2) centres (y, x) where allowed, rarely nearer than about the pitch: a shaken hexagonal lattice, turned at random."""
    steps = int(np.ceil(1.5 * size / pitch)) + 2
    i, j = np.mgrid[-steps : steps + 1, -steps : steps + 1]
    lattice = np.stack([i * np.sqrt(0.75), j + 0.5 * (i % 2)], -1).reshape(-1, 2) * pitch
    lattice += rng.uniform(-0.24, 0.24, lattice.shape) * pitch
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = lattice @ turn + rng.uniform(0, size, 2)
    margin = 5  # nuclei that reach into the patch from outside
    points = points[((points > -margin) & (points < size + margin)).all(1)]
    nearest = np.clip(np.rint(points), 0, size - 1).astype(int)
    points = points[allowed_SS[nearest[:, 0], nearest[:, 1]]]
    return points[rng.permutation(len(points))]


def _spread(rng, size, pitch, margin):
    """(n, 2) centres (y, x) of larger structures, at least one of them in the patch."""
    points = _scatter(rng, size, pitch, np.ones((size, size), bool))
    inside = points[((points > -margin) & (points < size + margin)).all(1)]
    return inside if len(inside) else rng.uniform(0.25, 0.75, (1, 2)) * size


def _generator(seed, organ, purpose, number):
    """NumPy's generator for one purpose. Unlike the draws of a run, these need not outlive a NumPy release: bytes are kept."""
    return np.random.Generator(np.random.PCG64([seed, ORGANS.index(organ), ("classes", "slide", "patch").index(purpose), number]))


# ---- Files ----


def _draw_files(config, folder, indices: Sequence[int]) -> None:
    classes = patch_classes(config.patches, config.seed) if config.organ == "breast" else None
    for index in indices:
        slide, kind = index % config.slides, classes[index] if classes else None
        parts = ([kind] if kind else []) + [slide_name(config.organ, slide), f"p{index:06d}.jpg"]
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw_patch(config.organ, kind, index=index, slide=slide, size=config.size, seed=config.seed)))
        tick(1)


def _read_marker(folder):
    try:
        return json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check(config):
    if config.organ not in ORGANS:
        raise ValueError(f"organ {config.organ!r} is not known: breast (three classes) or kidney (no labels)")
    for name, low, high in (("patches", 1, 10**7), ("size", 32, 1024), ("slides", 1, 10**4), ("workers", 1, 256)):
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name} {getattr(config, name)} is out of range: give {low} to {high}")
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"seed {config.seed} is out of range: give a whole number from 0 to 2**64 - 1")


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="synthetic.py", description=(__doc__ or "").split("\n")[0]))
