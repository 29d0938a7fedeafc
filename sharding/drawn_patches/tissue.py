"""One patch of tissue: stroma, epithelium, nuclei. Amounts of haematoxylin (h) and eosin (e) per pixel, about 0 to 2.

Shapes: S side of the patch, n nuclei.
"""

from dataclasses import dataclass

import numpy as np

from sharding.drawn_patches.random_fields import edge, noise, scatter


@dataclass(frozen=True)
class Nuclei:
    """What the nuclei of an epithelium look like. Lengths in pixels."""

    radius: float
    radius_spread: float  # standard deviation within a patch, as a share of the radius
    elongation: float  # long over short axis, mean
    irregularity: float  # of the outline, as a share of the radius
    gap: float  # between neighbours' centres, as a multiple of the two radii's sum
    clumping: float  # contrast of the chromatin
    nucleolus: float  # share of nuclei that show one


class Tissue:
    """A patch while it is drawn: the stroma first, then epithelium over it, then nuclei."""

    def __init__(self, rng, size):
        self.rng, self.size = rng, size
        self.y_SS, self.x_SS = np.mgrid[:size, :size].astype(np.float32)
        self.epithelium_SS = np.zeros((size, size), np.float32)  # 0 to 1
        self.void_SS = np.zeros((size, size), np.float32)  # 0 to 1: lumens and clefts, where light passes
        self.warp_SS = noise(rng, size, size / 18)  # makes circles look grown
        self.angle = rng.uniform(0, np.pi)  # of the fibres
        self.nuclei: list[tuple[np.ndarray, np.ndarray]] = []
        self.h_SS = np.zeros((size, size), np.float32)
        self.n_SS = np.zeros((size, size), np.float32)  # 0 to 1: nucleus

    def _distance(self, centre, radius):
        return np.hypot(self.y_SS - centre[0], self.x_SS - centre[1]) + 0.1 * radius * self.warp_SS

    def add_round(self, centre, radius, hole):
        """A duct, tubule or nest: a disc of epithelium with a hole of that share of its radius."""
        distance_SS = self._distance(centre, radius)
        disc_SS = edge(radius - distance_SS, 0.8)
        if hole > 0:
            hole_SS = edge(hole * radius - distance_SS, 0.8)
            disc_SS, self.void_SS = disc_SS - hole_SS, np.maximum(self.void_SS, hole_SS)
        self.void_SS = self.void_SS * (1 - np.maximum(disc_SS, 0))
        self.epithelium_SS = np.maximum(self.epithelium_SS, disc_SS) * (1 - self.void_SS)

    def add_epithelium(self, depth_SS, softness):
        """Epithelium where the depth is negative."""
        self.epithelium_SS = np.maximum(self.epithelium_SS, edge(-depth_SS, softness))

    def clear(self, centre, radius):
        """An empty disc."""
        disc_SS = edge(radius - self._distance(centre, radius), 0.8)
        self.void_SS = np.maximum(self.void_SS, disc_SS)
        self.epithelium_SS *= 1 - disc_SS

    def add_nuclei(self, nuclei):
        """The epithelium's, then those of the stroma: spindles along the fibres, and some round lymphocytes."""
        rng = self.rng
        pitch = 2 * nuclei.radius * nuclei.gap
        centres = scatter(rng, self.size, pitch, self.epithelium_SS > 0.6)
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
            spots = scatter(rng, self.size, 9.0, stroma)
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
        mask = edge(each(short) * (1 - inside), 0.45)
        chromatin = each(depth) * (0.82 + 0.3 * np.exp(-(((inside - 0.86) / 0.14) ** 2)))  # a darker membrane
        spot_y, spot_x = (rng.uniform(-0.3, 0.3, (2, n)) * short).astype(np.float32)
        spots = np.exp(-((dy - each(spot_y)) ** 2 + (dx - each(spot_x)) ** 2) / np.float32(1.6))
        chromatin = chromatin + each(0.6 * nucleolus) * spots - each(0.12 * nucleolus)  # pale around its nucleolus
        grain = noise(rng, self.size, self.size / 2.2)
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
        # Stroma: wavy fibres, some of them separated by clefts.
        along = self.x_SS * np.sin(self.angle) - self.y_SS * np.cos(self.angle)
        bend = noise(rng, size, size / 30) * 7
        streak = noise(rng, size, size / 6)
        fibres = np.sin((along + bend) * (2 * np.pi / rng.uniform(6, 10)) + 1.4 * streak)
        cleft = edge(-fibres - rng.uniform(0.85, 1.3) + 0.35 * noise(rng, size, size / 14), 0.1)
        grain, cloud = noise(rng, size, size / 2), noise(rng, size, size / 24)
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
