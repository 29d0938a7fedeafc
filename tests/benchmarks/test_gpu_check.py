import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"environment", "data", "decode", "views", "purity", "model", "loader", "joint"}


def _run(out: Path, *arguments: object) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The process, and the records that it left in the folder."""
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(out), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=220, check=False)
    return done, [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    done, (record,) = _run(out, "--dry")
    return done, record, out


def test_a_dry_run_holds_every_step(dry):
    done, record, out = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(record["steps"]) == STEPS
    assert {name for name, step in record["steps"].items() if step["status"] != "ok"} == set()
    (table,) = out.glob("*.md")
    assert table.name.endswith("-gpu-check-cpu.md")
    assert all(f"| {name} |" in table.read_text() for name in STEPS)


def test_on_a_cpu_nothing_differs_from_the_cpu(dry):
    steps = dry[1]["steps"]
    assert all(result["max"] == 0 and result["same_in_other_batch"] for name, result in steps["decode"].items() if ", " in name)
    assert steps["views"]["simclr, as stored"]["max"] == 0
    assert steps["views"]["colour alone"]["max"] < 0.01  # torch's and Numba's rounding
    assert steps["purity"]["all_identical"]


def test_rates_are_there(dry):
    steps = dry[1]["steps"]
    assert steps["loader"]["1 threads"]["patches_per_s"] > 0
    assert steps["model"]["img_per_s"] > 0
    assert steps["joint"]["patches_per_s"] > 0
    assert steps["joint"]["joint_to_model"] > 0
    assert 0 <= steps["joint"]["data_wait"] <= 1


def test_a_failed_step_is_loud_and_leaves_the_others(tmp_path):
    done, (record,) = _run(tmp_path, "--dry", "--steps", "model", "--backbone", "resnot")
    assert done.returncode == 1
    assert "FAILED model" in done.stdout
    assert done.stderr.endswith("FAILED: model\n")
    assert record["steps"]["environment"]["status"] == "ok"
    assert record["steps"]["model"]["status"] == "failed"
    assert "resnot" in record["steps"]["model"]["error"]
    assert "data" not in record["steps"]


@pytest.mark.parametrize("arguments", [["--steps", "modle"], ["--data", "no/such/set", "--steps", "views"]])
def test_slips(tmp_path, arguments):
    done, records = _run(tmp_path, "--dry", *arguments)
    if arguments[0] == "--steps":
        assert (done.returncode, records) == (2, [])
        assert "no step 'modle'" in done.stderr
    else:  # told by the step, as the GPU's time may already run
        assert done.returncode == 1
        assert "no/such/set" in records[0]["steps"]["data"]["error"]
