"""The benchmark of parity: its figures by hand, its verdict, and its command on a few small patches."""

import math

import parity
import pytest
import torch

from pipelines.recipes import get_recipe
from pipelines.torchvision_reference import reference_views
from tests.helpers import encoded, write_tree

SIZE = 48


# Figures


def test_figures_by_hand():
    """Of 0, 1, 2 and 5 without their signs; the percentile lies 99.9 % of the way from the first to the last of the four."""
    figures = parity.figures(torch.tensor([[-1.0, 0.0], [2.0, -5.0]]))
    assert figures["mean"] == 2.0
    assert figures["max"] == 5.0
    assert figures["p99_9"] == pytest.approx(2 + (0.999 * 3 - 2) * (5 - 2))


def test_differences_are_in_levels_of_255():
    """A graph whose red is 3 levels too bright differs by 1 in the mean, whatever the channels are normalised by."""

    class Brighter:
        recipe, image_size = get_recipe("eval"), SIZE

        def __init__(self, levels):
            self.levels = levels

        def put(self, encoded, drawn):
            self.views = reference_views(encoded, drawn, recipe=self.recipe, image_size=SIZE)
            self.views[:, :, 0] += self.levels / 255 / self.recipe.std[0]

        def get(self):
            return self.views

    figures = parity.compare({"graph": Brighter(3), "torch": Brighter(-6)}, parity.drawn_patches(3, SIZE))
    assert set(figures) == set(parity.COLUMNS)
    assert figures["graph"] == pytest.approx({"mean": 1.0, "p99_9": 3.0, "max": 3.0}, abs=1e-3)
    assert figures["torch"] == pytest.approx({"mean": 2.0, "p99_9": 6.0, "max": 6.0}, abs=1e-3)
    assert figures["rounded"]["max"] < 0.01  # there is nothing to round: nothing is resized


# Patches


def test_real_patches_are_spread_over_all_that_lie_there(tmp_path):
    names = ["a/0.jpg", "a/1.PNG", "b/c/2.jpeg", "b/3.JPG", "d.png"]
    files = {name: encoded(i, format="JPEG" if "j" in name.lower() else "PNG") for i, name in enumerate(names)}
    write_tree(tmp_path, files | {"a/notes.txt": b"no image"})
    in_order = [files[name] for name in sorted(files)]
    assert [one.tobytes() for one in parity.real_patches(str(tmp_path), 5)] == in_order
    assert [one.tobytes() for one in parity.real_patches(str(tmp_path), 3)] == in_order[::2]
    with pytest.raises(ValueError, match="5 JPEG and PNG files lie there, fewer than --patches 6"):
        parity.real_patches(str(tmp_path), 6)


# The command


@pytest.mark.parametrize(
    ("column", "figures", "too_far"),
    [
        ("graph", {"mean": 1.0, "p99_9": 4.0, "max": 200.0}, False),
        ("graph", {"mean": 1.01}, True),
        ("graph", {"p99_9": 4.01}, True),
        ("torch", {"mean": math.nan}, True),
        ("rounded", {"mean": 90.0, "p99_9": 90.0}, False),  # torchvision's own way is no fault of ours
    ],
)
def test_limits(tmp_path, monkeypatch, run_main, column, figures, too_far):
    none = {"mean": 0.0, "p99_9": 0.0, "max": 0.0}
    monkeypatch.setattr(parity, "OPERATIONS", {})
    monkeypatch.setattr(parity, "RECIPES", {"eval": get_recipe("eval")})
    monkeypatch.setattr(parity, "DaliGraph", lambda **_: None)
    monkeypatch.setattr(parity, "compare", lambda *_: dict.fromkeys(parity.COLUMNS, none) | {column: none | figures})
    record, _, code = run_main(parity.main, parity.Config(out=str(tmp_path), patches=1))
    assert code == int(too_far)
    assert record["too_far"] == ([f"{parity.COLUMNS[column]}: recipe eval on drawn"] if too_far else [])


def test_the_command(monkeypatch, tmp_path, run_main):
    """Two cases instead of all: DALI compiles each one's graphs for a second."""
    monkeypatch.setattr(parity, "OPERATIONS", {"hue": parity.OPERATIONS["hue 0.2"]})
    monkeypatch.setattr(parity, "RECIPES", {"eval": get_recipe("eval")})
    files = write_tree(tmp_path / "breast", {f"{i}.png": encoded(i, format="PNG") for i in range(3)})
    config = parity.Config(out=str(tmp_path / "out"), image_size=SIZE, patches=2, images=[str(files)])
    record, text, code = run_main(parity.main, config)
    cases = [(row["case"], row["source"]) for row in record["rows"]]
    assert code == 0 and cases == [(case, source) for case in ("hue", "recipe eval") for source in ("drawn", "breast")]
    for row in record["rows"]:
        assert row["graph"]["max"] < 0.05 and f"| {row['case']} | {row['source']} | {row['graph']['mean']:.4f} / " in text
    assert record["rows"][0]["rounded"]["mean"] > 0.1  # hue in whole levels: the comparison is of something


def test_folders_that_the_table_could_not_tell_apart_are_refused(tmp_path):
    files = write_tree(tmp_path / "drawn", {"0.png": encoded(0, format="PNG")})
    with pytest.raises(ValueError, match="give folders of different names"):
        parity.main(parity.Config(out=str(tmp_path / "out"), patches=1, images=[str(files)]))
