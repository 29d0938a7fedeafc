"""The report's pictures."""

import io
import re

from PIL import Image

from train import figures


def texts(svg):
    return re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S)


def test_curve_leaves_out_what_is_no_number():
    """A line through the other points, and none where there is nothing."""
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 2.0}, {"step": 5, "loss": 1.0}]
    svg = figures.curves({"a": rows, "b": []}, "loss", "the loss")
    assert "nan" not in svg.lower()
    assert texts(svg).count("the loss") == 1 and "step" in texts(svg)
    lines = re.findall(r'<path d="([^"]*)"[^>]*stroke: #0072b2', svg)
    assert any(path.count("L") == 2 for path in lines)


def test_one_run_needs_no_legend():
    rows = [{"step": step, "loss": 1.0} for step in range(5)]
    assert "only" not in texts(figures.curves({"only": rows}, "loss", "t"))
    both = figures.curves({"one": rows, "other": rows}, "loss", "t")
    assert {"one", "other"} <= set(texts(both))


def test_confusion_writes_rows_from_the_top():
    svg = figures.confusion([[5, 1], [2, 7000]], ["x", "y"], "a run")
    places = {
        text: (float(x), float(y))
        for x, y, text in re.findall(
            r'<text[^>]*?(?:transform="translate\(|x=")([\d.]+)[ "]+(?:y=")?([\d.]+)[^>]*>(5|1|2|7,000)</text>', svg
        )
    }
    assert set(places) == {"5", "1", "2", "7,000"}
    assert places["5"][1] == places["1"][1] < places["2"][1] == places["7,000"][1]
    assert places["5"][0] == places["2"][0] < places["1"][0] == places["7,000"][0]


def test_class_without_patches_divides_by_nothing():
    assert "nan" not in figures.confusion([[0, 0], [0, 3]], ["x", "y"], "a run").lower()


def test_pairs_is_a_sheet_of_the_first_patches(small_set):
    png = figures.pairs(str(small_set), recipe="supervised", image_size=64, seed=3)
    with Image.open(io.BytesIO(png)) as sheet:
        columns, rows, cell = 2, 3, figures._READABLE + 8
        assert sheet.size == (columns * (2 * cell + 8), rows * (cell + 38) + 8)
    assert png == figures.pairs(str(small_set), recipe="supervised", image_size=64, seed=3)
    assert png != figures.pairs(str(small_set), recipe="supervised", image_size=64, seed=4)


def test_dollars_in_names_are_text():
    """And no formula, which would swallow them or fail."""
    names = ["$5 & $6", r"$\frac$"]
    svg = figures.confusion([[1, 0], [0, 1]], names, "a $run$")
    assert {"$5 &amp; $6", r"$\frac$", "a $run$"} <= set(texts(svg))
    assert "my $run$" in texts(figures.curves({"my $run$": [{"step": 1, "x": 1.0}], "b": []}, "x", "t"))
