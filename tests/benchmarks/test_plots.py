"""Plots of results: what is drawn of a record, and what is refused."""

import json
from pathlib import Path

import plots
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HEAD = {"date": "2001-01-01", "machine": {"cores": 2}}


def test_bar_has_every_round_and_what_failed_has_none():
    record = HEAD | {
        "timed": {"image_size": 224, "batch_size": 8},
        "runs": {
            "torchvision": [{"patches_per_s": 2.0}, {"patches_per_s": 4.0}],
            "dali": [],
            "ours": [{"patches_per_s": 9.0}],
            "parts": [{"ms": {}}],
        },
    }
    (panel,) = plots.loader(record)
    assert panel.unit == "patches/s"
    assert [(bar.values, bar.ours) for bar in panel.bars] == [([2.0, 4.0], False), ([9.0], True)]


def test_lines_are_in_milliseconds_and_mebibytes_and_end_where_a_contender_does():
    row = {"seconds": 0.5, "peak_bytes": 3 * 2**20}
    record = HEAD | {"summary": {"64": {"ours": row, "plain": row}, "128": {"ours": row}}}
    time, memory = plots.loss(record)
    assert time.lines == {"ours": [(64, 500.0), (128, 500.0)], "plain formula": [(64, 500.0)]} and time.y == "ms"
    assert memory.lines["ours"] == [(64, 3.0), (128, 3.0)] and memory.y == "MiB"


def test_runs_of_the_smoke_test_are_shares_of_their_median():
    record = HEAD | {"runs": [{"views": {"ratio": 8.0}}, {"views": {"ratio": 4.0}}, {"views": {"ratio": 12.0}}]}
    (panel,) = plots.ratios(record)
    assert [bar.values for bar in panel.bars] == [[1.0, 0.5, 1.5]]


def test_losses_are_averaged_over_seeds_and_who_does_not_train_has_no_curve():
    runs = {"ours": [{"curve": [5.0, 3.0]}, {"curve": [4.0, 2.0]}], "random": [{"figures": {}}]}
    (panel,) = plots.curves(HEAD | {"runs": runs, "settings": {"seeds": [0, 1]}})
    assert list(panel.lines.values()) == [[(1, 4.5), (2, 2.5)]] and "2 seeds" in panel.title


def test_every_kind_of_committed_result_can_be_drawn(tmp_path):
    files = []
    for kind in plots.PANELS:
        for path in sorted(RESULTS.glob(f"*-{kind}.json"))[-1:]:
            files.append(tmp_path / path.name)
            files[-1].write_bytes(path.read_bytes())
    assert len(files) >= 5
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
