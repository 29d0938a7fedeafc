"""The report's pictures."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from pipelines.shard_reader import ShardReader
from train.reporting import plots
from train.reporting.plots import Line


def paths(svg, colour):
    return re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', svg)


def texts(svg):
    return re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)


def test_a_line_for_each_run_in_its_own_style():
    """By its place in the report, wherever it is drawn."""
    svg = plots.curves([Line(0, [1, 2, 3], [3.0, 2.0, 1.0]), Line(8, [1, 2, 3], [1.0, 1.0, 1.0])])
    (first,), (second,) = paths(svg, plots.COLOURS[0]), paths(svg, plots.COLOURS[1])
    assert first.count("L") == second.count("L") == 2
    assert "stroke-dasharray" in svg  # the colours have come round
    assert "stroke-dasharray" not in plots.curves([Line(1, [1, 2, 3], [1.0, 1.0, 1.0])])


def test_a_single_point_is_seen():
    assert "<use" in plots.curves([Line(0, [5], [1.0])]).split("axes")[-1]


@pytest.mark.parametrize("draw", [plots.curves, plots.over_fractions])
def test_ink_is_the_page_s(draw):
    svg = draw([Line(0, [0.05, 1.0], [0.5, 0.6])])
    assert "currentColor" in svg and "var(--line" in svg
    assert "#010203" not in svg and "#000000" not in svg and "<style" not in svg


def test_ids_are_only_those_that_are_referred_to():
    svg = plots.curves([Line(0, [1, 2], [1.0, 2.0])])
    referred = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    assert set(re.findall(r' id="([^"]*)"', svg)) == referred != set()


def test_fractions_are_marked_where_they_are():
    svg = plots.over_fractions([Line(0, [0.005, 0.05, 1.0], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8])])
    assert {"0.005", "5%", "100%"} <= set(texts(svg))
    without = plots.over_fractions([Line(0, [0.005, 0.05, 1.0], [0.5, 0.6, 0.7])])
    assert len(paths(svg, plots.COLOURS[0])) == len(paths(without, plots.COLOURS[0])) + 3  # an interval at each


def test_reliability_goes_through_its_bins():
    """Eight predictions held for 0.8 probable, of which six are right; two for 0.3, of which none is; and one for 1."""
    confidence = np.array([0.8] * 8 + [0.3] * 2 + [1.0])
    right = np.array([True] * 6 + [False] * 4 + [True])
    svg = plots.reliability(confidence, right)
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", paths(svg, plots.COLOURS[0])[0])]
    (diagonal,) = [d for d in paths(svg, "currentColor") if d.count("L") == 1 and "stroke-dasharray" in svg.split(d)[1][:200]]
    (x0, y0), (x1, y1) = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", diagonal)]
    shown = [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in points]
    np.testing.assert_allclose(shown, [(0.3, 0), (0.8, 0.75), (1, 1)], atol=1e-3)


def test_a_map_has_its_points_as_pixels():
    x, y = np.random.default_rng(0).normal(size=(2, 2000))
    svg = plots.scatter(x, y, [(x > 0, "#ff0000", "o"), (x <= 0, "#00ff00", "s")])
    assert svg.count("data:image/png") == 1 and len(svg) < 150_000
    assert plots.scatter(x, y, [(x > 9, "#ff0000", "o")]) != svg


def test_equal_figures_have_equal_bytes():
    lines = [Line(0, [1, 2, 3], [3.0, 2.0, 1.0])]
    assert plots.curves(lines) == plots.curves(lines)


def test_pairs_are_the_first_patches(small_set):
    shown = plots.pairs(str(small_set), recipe="supervised", image_size=64, seed=3)
    assert [len(pair) for pair in shown] == [2] * 6
    for i, (patch, view) in enumerate(shown):
        assert patch.caption.startswith(f"patch {i}\nclass ")
        sizes = [Image.open(io.BytesIO(picture.jpeg)).size for picture in (patch, view)]
        assert sizes == [(16, 12), (192, 192)]
        assert " at " in view.caption  # the crop
    assert shown == plots.pairs(str(small_set), recipe="supervised", image_size=64, seed=3)
    assert shown != plots.pairs(str(small_set), recipe="supervised", image_size=64, seed=4)
    assert len(ShardReader(small_set)) > len(shown)
