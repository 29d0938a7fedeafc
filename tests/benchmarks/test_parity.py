"""The benchmark of parity: its figures by hand, its verdict, and its command on a few small patches."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipelines.recipes import get_recipe
from pipelines.torchvision_reference import reference_views
from sharding.cli import run_script
from sharding.drawn_patches.patches import draw_patch, encode
from tests.helpers import assert_refused, encoded, write_tree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks import parity  # noqa: E402

pytestmark = pytest.mark.timeout(120)

SIZE = 48
NONE = {"mean": 0.0, "p99_9": 0.0, "max": 0.0}


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few(monkeypatch):
    """Two cases instead of all: DALI compiles each one's graphs for a second."""
    monkeypatch.setattr(parity, "OPERATIONS", {"hue": parity.OPERATIONS["hue 0.2"]})
    monkeypatch.setattr(parity, "RECIPES", {"eval": get_recipe("eval")})


@pytest.fixture
def found(monkeypatch, few):
    """The figures that the comparison gives, by column and case: what is set here, and otherwise none."""
    given = {}

    def compare(graphs, patches):
        return {column: NONE | given.get((column, graphs["graph"]), {}) for column in parity.COLUMNS}

    names = {recipe: name for name, recipe in [*parity.OPERATIONS.items(), ("recipe eval", get_recipe("eval"))]}
    monkeypatch.setattr(parity, "DaliGraph", lambda *, recipe, **settings: names[recipe])
    monkeypatch.setattr(parity, "compare", compare)
    return given


def run(out: Path, *arguments: object) -> int:
    """The command, in this process."""
    given = [str(each) for each in ("--out", out, "--image-size", SIZE, *arguments)]
    try:
        return run_script(parity.main, parity.Config, prog="parity.py", description="", arguments=given)
    except SystemExit as ended:
        return ended.code


def record_of(out: Path) -> dict:
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


# Figures


def test_figures_by_hand():
    """Of 0, 1, 2 and 5 without their signs; the percentile lies 99.9 % of the way from the first to the last of the four."""
    figures = parity.figures(torch.tensor([[-1.0, 0.0], [2.0, -5.0]]))
    assert figures["mean"] == 2.0
    assert figures["max"] == 5.0
    assert figures["p99_9"] == pytest.approx(2 + (0.999 * 3 - 2) * (5 - 2))


def test_percentile_leaves_out_a_thousandth():
    difference = torch.zeros(10_000)
    difference[:9] = 100.0
    assert parity.figures(difference) == {"mean": pytest.approx(0.09), "p99_9": 0.0, "max": 100.0}
    difference[:11] = -100.0
    assert parity.figures(difference)["p99_9"] == 100.0


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


@pytest.fixture(scope="module")
def breast(tmp_path_factory) -> Path:
    """A folder of three real files; how they were made is not known to the benchmark."""
    patches = {f"{i}.jpg": encode(draw_patch("breast", "benign", index=i, slide=0, size=64, seed=1)) for i in range(3)}
    return write_tree(tmp_path_factory.mktemp("images") / "breast", patches)


def test_command_writes_a_table_and_its_figures(few, breast, tmp_path, capsys):
    assert run(tmp_path, "--patches", 2, "--images", breast) == 0
    record = record_of(tmp_path)
    assert record["too_far"] == []
    assert (record["patches"], record["image_size"], record["benchmark"]) == (2, SIZE, "parity")
    assert {"date", "machine", "versions", "commit", "command"} <= record.keys()
    cases = [(row["case"], row["source"]) for row in record["rows"]]
    assert cases == [(case, source) for case in ("hue", "recipe eval") for source in ("drawn", "breast")]
    for row in record["rows"]:
        for column in parity.COLUMNS:
            figures = row[column]
            assert 0 <= figures["mean"] <= figures["p99_9"] <= figures["max"] < 10
        assert row["graph"]["max"] < 0.05
    assert record["rows"][0]["rounded"]["mean"] > 0.1  # hue in whole levels: the comparison is of something

    (path,) = tmp_path.glob("*.md")
    assert path.stem == next(tmp_path.glob("*.json")).stem
    table, printed = path.read_text(), capsys.readouterr().out
    assert printed.endswith(f"{path}\n")
    for row in record["rows"]:
        cells = [
            f"{figures['mean']:.4f} / {figures['p99_9']:.3f} / {figures['max']:.2f}" for figures in map(row.get, parity.COLUMNS)
        ]
        line = f"| {row['case']} | {row['source']} | {' | '.join(cells)} |\n"
        assert line in table and line in printed
    assert table.endswith("at the 99.9th percentile: none.\n")


def test_what_is_too_far_is_told_and_ends_with_1(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "RECIPES", {})
    monkeypatch.setattr(parity, "MEAN", 1e-9)
    assert run(tmp_path, "--patches", 2) == 1
    told = f"{parity.COLUMNS['graph']}: hue on drawn"
    assert told in record_of(tmp_path)["too_far"]
    (path,) = tmp_path.glob("*.md")
    assert told in path.read_text().splitlines()[-1]
    assert capsys.readouterr().err.startswith("TOO FAR: ") and "none" not in path.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("column", "figures", "too_far"),
    [
        ("graph", {"mean": 1.0, "p99_9": 4.0, "max": 200.0}, False),
        ("graph", {"mean": 1.01}, True),
        ("graph", {"p99_9": 4.01}, True),
        ("graph", {"mean": math.nan}, True),
        ("torch", {"mean": 1.01}, True),
        ("torch", {"p99_9": math.nan}, True),
        ("rounded", {"mean": 90.0, "p99_9": 90.0}, False),  # torchvision's own way is no fault of ours
    ],
)
def test_limits(found, tmp_path, column, figures, too_far):
    found[column, "recipe eval"] = figures
    assert run(tmp_path, "--patches", 1) == int(too_far)
    told = [f"{parity.COLUMNS[column]}: recipe eval on drawn"] if too_far else []
    assert record_of(tmp_path)["too_far"] == told


def test_earlier_results_stay(found, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: form.replace("%Y-%m-%d", "2026-01-02"))
    for _ in range(3):
        assert run(tmp_path, "--patches", 1) == 0
    names = ["2026-01-02-parity", "2026-01-02-parity-2", "2026-01-02-parity-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.{end}" for name in names for end in ("json", "md"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--patches", 0], "--patches must be at least 1"),
        (["--image-size", 31], "--image-size at least 32"),
        (["--patches", 4, "--images", "{breast}"], "3 JPEG and PNG files lie there, fewer than --patches 4"),
        (["--patches", 1, "--images", "{breast}", "{breast}/."], "could not tell drawn and breast and breast apart"),
        (["--patches", 1, "--images", "elsewhere/drawn"], "could not tell drawn and drawn apart"),
    ],
)
def test_slips_are_told_and_end_with_2(found, breast, tmp_path, capsys, arguments, words):
    assert run(tmp_path, *(str(each).format(breast=breast) for each in arguments)) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_script_needs_no_installed_project(tmp_path):
    command = [
        sys.executable,
        "benchmarks/parity.py",
        "--out",
        str(tmp_path / "results"),
        "--patches",
        "1",
        "--images",
        str(tmp_path),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100, check=False)
    assert_refused(done, f"parity.py: {tmp_path}: 0 JPEG and PNG files lie there")
    assert not list(tmp_path.iterdir())
