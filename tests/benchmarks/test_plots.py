"""Plots of results: what is drawn of a record, and what is refused."""

import json
from pathlib import Path

import plots
import pytest
from PIL import Image

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
HEAD = {"date": "2001-01-01", "machine": {"cores": 2}}


def test_a_bar_has_every_round_and_what_failed_has_none():
    runs = {"torchvision": [{"patches_per_s": 2.0}, {"patches_per_s": 4.0}], "dali": [], "parts": [{"ms": {}}]}
    (axes,) = plots.loader(HEAD | {"timed": {"image_size": 224, "batch_size": 8}, "runs": runs}).axes
    (bar,), (dots,) = axes.patches, axes.lines
    assert bar.get_width() == 3.0 and list(dots.get_xdata()) == [2.0, 4.0]


def test_losses_are_averaged_over_seeds_and_who_does_not_train_has_no_curve():
    runs = {"ours": [{"curve": [5.0, 3.0]}, {"curve": [4.0, 2.0]}], "random": [{"figures": {}}]}
    (axes,) = plots.curves(HEAD | {"runs": runs, "settings": {"seeds": [0, 1]}}).axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1, 4.5], [2, 2.5]] and "2 seeds" in axes.get_title(loc="left")


def test_every_kind_of_committed_result_can_be_drawn(tmp_path):
    files = []
    for kind in plots.PLOTS:
        for path in sorted(path for path in RESULTS.glob("*.json") if plots.kind_of(path) == kind)[-1:]:
            files.append(tmp_path / path.name)
            files[-1].write_bytes(path.read_bytes())
    assert len(files) == 4
    plots.main(plots.Config(list(map(str, files))))
    for path in files:
        with Image.open(path.with_suffix(".png")) as image:
            assert image.width > 700 and len(image.convert("L").getcolors()) > 20  # more than an empty frame


def test_a_file_without_a_plot_is_refused_and_nothing_is_drawn(tmp_path):
    good, strange = tmp_path / "2001-01-01-loader.json", tmp_path / "2001-01-01-soak.json"
    good.write_bytes((RESULTS / "2026-11-23-loader.json").read_bytes())
    strange.write_text(json.dumps(HEAD))
    with pytest.raises(ValueError, match=f"{strange}: no plot for this kind of result"):
        plots.main(plots.Config([str(good), str(strange)]))
    assert not good.with_suffix(".png").exists()
