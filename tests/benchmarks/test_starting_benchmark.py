import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

from measuring import RunFailed  # noqa: E402

from benchmarks.starting import Config, end, markdown, one_round, seconds_until, start, table  # noqa: E402


def test_a_run_is_started_killed_and_goes_on(small_set, tmp_path):
    config = Config(work=str(tmp_path), image_size=32, batch_size=10, limit=200)
    found = one_round(0, "a", str(small_set), tmp_path, config)
    assert 1 < found["first"] < 200 and 1 < found["again"] < 200


def test_a_run_that_ends_without_a_step_says_why(tmp_path):
    run = start([sys.executable, "-c", "print('no patches')"], tmp_path / "log")
    with pytest.raises(RunFailed, match="no step after 0: no patches"):
        seconds_until(tmp_path, 0, run, 60, tmp_path / "log")
    waiting = start(["sleep", "100"], tmp_path / "log")
    with pytest.raises(RunFailed, match="no step after 3"):
        seconds_until(tmp_path, 3, waiting, 0, tmp_path / "log")
    end(waiting)
    assert isinstance(waiting, subprocess.Popen) and waiting.returncode == -9


def test_the_table_has_medians():
    rounds = {"plain": [{"imports": 1.0, "first": each, "again": 4.0} for each in (3.0, 9.0, 5.0)], "ray": []}
    header, rows = table({"rounds": rounds})
    assert rows == [
        ["without Ray", "1.0 (1.0 to 1.0)", "5.0 (3.0 to 9.0)", "4.0 (4.0 to 4.0)"],
        ["one Ray worker", *["failed"] * 3],
    ]
    record = {
        "date": "2026-01-01",
        "machine": {"cpu": "c", "cores": 2, "workers": 2, "memory_bytes": 1, "load": [0.5]},
        "commit": "abc",
        "command": "python benchmarks/starting.py",
        "versions": {},
        "timed": {"backbone": "b", "patches": 3, "size": 4, "batch_size": 5},
    }
    assert "| without Ray | 1.0 (1.0 to 1.0) | 5.0 (3.0 to 9.0)" in markdown(record, header, rows)
