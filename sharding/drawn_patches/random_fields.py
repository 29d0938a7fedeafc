"""Random fields and point patterns from which tissue is drawn."""

import functools

import numpy as np


def edge(x, softness):
    """0 to 1 where x goes from negative to positive, over about 4 times the softness."""
    return (0.5 + 0.5 * np.tanh(np.asarray(x, np.float32) / np.float32(2 * softness))).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _interpolation(size, knots):
    """The knot before each of (size,) points, and how far it is on the (smooth, cosine) way to the next."""
    position = np.linspace(0, knots - 1.001, size)
    before = np.floor(position).astype(int)
    return before, (0.5 - 0.5 * np.cos(np.pi * (position - before))).astype(np.float32)


def noise(rng, size, cells):
    """(size, size) smooth noise with mean 0 and deviation about 0.7, with that many waves along a side."""
    # No matrix products: the threads that NumPy starts for them stand in each other's way when several processes draw.
    knots = max(2, round(cells) + 1)
    before, part = _interpolation(size, knots)
    noise = rng.standard_normal((knots, knots), dtype=np.float32)
    noise = noise[before] + part[:, None] * (noise[before + 1] - noise[before])
    return noise[:, before] + part * (noise[:, before + 1] - noise[:, before])


def scatter(rng, size, pitch, allowed_SS):
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


def sparse_points(rng, size, pitch, margin):
    """(n, 2) centres (y, x) of larger structures, at least one of them in the patch."""
    points = scatter(rng, size, pitch, np.ones((size, size), bool))
    inside = points[((points > -margin) & (points < size + margin)).all(1)]
    return inside if len(inside) else rng.uniform(0.25, 0.75, (1, 2)) * size
