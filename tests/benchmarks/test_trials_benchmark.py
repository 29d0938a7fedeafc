import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

from benchmarks.trials import TINY, Config, judge, main, markdown, spans, study_text, summarise, target_lines, tiny_text  # noqa: E402
from train.records.runs import Run, write_json  # noqa: E402
from tune.study_file import read_study  # noqa: E402

FIELDS = {"backbone": "test_resnet", "image_size": 32, "batch_size": 16, "epochs": 1, "probe_every": 0}


def _rounds(*seconds):
    return [
        {"alone": {"summed": alone, "seconds": 0}, "grid": {"seconds": grid, "between": grid - 1, "summed": 0}}
        for alone, grid in seconds
    ]


def test_what_is_made_of_the_rounds():
    """Medians, and ratios within a round: 12 / (20 / 2), 11 / (22 / 2), 30 / (24 / 2)."""
    record = {"timed": {"fit": 2, "rounds": 3}, "rounds": _rounds((20, 12), (22, 11), (24, 30)), "tiny": []}
    found = summarise(record)
    assert found["ratio"] == pytest.approx(1.2) and found["ratio_between"] == pytest.approx(1.1)
    assert (found["alone_s"], found["grid_s"], found["between_s"]) == (22, 12, 11) and "tiny_s" not in found
    assert [each["enough"] for each in judge(found)] == [False, None]
    lines = target_lines({"targets": judge(found)})
    assert lines[0].startswith("MISSED") and "1.2, wanted at most 1.15" in lines[0] and lines[1].startswith("not measured")
    assert [each["enough"] for each in judge({"ratio": 1.15, "tiny_s": 181.0})] == [True, False]


def test_spans_of_runs_that_overlap(tmp_path):
    runs = []
    for name, seconds, end in (("a", 10.0, 1000.0), ("b", 12.0, 1008.0)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {"wall_seconds": seconds})
        write_json(tmp_path / name / "result.json", {})
        os.utime(tmp_path / name / "result.json", (end, end))
        runs.append(Run(tmp_path / name))
    assert spans(runs) == (22.0, 18.0)


def test_the_studies_can_be_read(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(study_text(FIELDS, "shards", tmp_path, trials=3, cpus=2, gpus=0.25))
    study = read_study(path)
    assert len(study.cells) == 3 and study.resources["pretrain"].gpus == 0.25 and study.resources["pretrain"].cpus == 2
    path.write_text(tiny_text("shards", tmp_path))
    assert len(read_study(path).cells) == TINY


def test_bad_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--trials 1 is out of range: give at least 2"):
        main(Config(work=str(tmp_path), trials=1))
    with pytest.raises(ValueError, match="--fit 1000 is out of range"):
        main(Config(work=str(tmp_path), fit=1000))


def test_the_page_says_what_was_timed():
    timed = FIELDS | {"fit": 2, "rounds": 1, "trials": 4, "cpus": 1, "patches": 256}
    record = {"timed": timed, "rounds": _rounds((20, 12)), "tiny": [{"seconds": 50.0, "summed": 20.0}], "date": "2026-01-02"}
    machine = {"cpu": "some", "cores": 2, "workers": 2, "memory_bytes": 1e9, "load": [0.1], "gpu": None}
    record |= {"machine": machine, "commit": "abc", "command": "python x", "versions": {"torch": "1"}}
    record["summary"] = summarise(record)
    record["targets"] = judge(record["summary"])
    text = markdown(record)
    assert "| 4 trials alone, one after another, summed | 20.0 | - |" in text and "reached: 16 tiny cells, s: 50" in text
