"""Plots of results: what is drawn of a record, and what is refused."""

from pathlib import Path

import plots
import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_a_bar_is_the_median_and_has_every_round_and_what_failed_has_none():
    runs = {"torchvision": [{"patches_per_s": 2.0}, {"patches_per_s": 4.0}], "dali": [], "parts": [{"ms": {}}]}
    (axes,) = plots.loader({"timed": {"image_size": 224, "batch_size": 8}, "runs": runs}).axes
    (bar,), (dots,) = axes.patches, axes.lines
    assert bar.get_width() == 3.0 and list(dots.get_xdata()) == [2.0, 4.0]


def test_losses_are_averaged_over_seeds_and_who_does_not_train_has_no_curve():
    runs = {"ours": [{"curve": [5.0, 3.0]}, {"curve": [4.0, 2.0]}], "random": [{"figures": {}}]}
    (axes,) = plots.curves({"runs": runs, "settings": {"seeds": [0, 1]}}).axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1, 4.5], [2, 2.5]]


def test_committed_results_are_drawn_and_a_file_without_a_plot_is_refused(tmp_path):
    paths = [tmp_path / f"2026-11-{name}.json" for name in ("23-loader-3", "23-ntxent-cpu", "24-equal-work-3", "23-scale-2")]
    for path in paths:
        path.write_bytes((RESULTS / path.name).read_bytes())
    strange = tmp_path / "2001-01-01-soak.json"
    with pytest.raises(ValueError, match=f"{strange}: no plot for this kind of result"):
        plots.main(plots.Config([*map(str, paths), str(strange)]))
    assert not list(tmp_path.glob("*.png"))
    plots.main(plots.Config(list(map(str, paths))))
    assert all(path.with_suffix(".png").stat().st_size > 10_000 for path in paths)
