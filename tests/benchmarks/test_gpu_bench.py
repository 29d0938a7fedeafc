"""The GPU benchmark and its check of correctness."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import gpu_bench
import gpu_check
import numpy as np
import pytest
import torch
from gpu_bench import PARTS, Config, Part, Setting, chosen_parts, commands, main
from report import Report

from sharding.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]

# What a part may be: writes what it found, and ends, fails, or hangs after it started a process that writes as long as it lives
SCRIPT = """
import json, pathlib, subprocess, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(arguments["--out"])
out.mkdir(parents=True)
(out / "2001-01-01-it.json").write_text(json.dumps({"figure": 42}))
if arguments["--do"] == "hang":
    beats = "import sys, time\\nwhile True: open(sys.argv[1], 'a').write('.'); time.sleep(0.01)"
    subprocess.Popen([sys.executable, "-c", beats, arguments["--beats"]])
    time.sleep(600)
if arguments["--do"] == "fail":
    sys.exit("it is broken")
"""


@pytest.fixture
def run_parts(tmp_path, monkeypatch, run_main):
    """Runs three parts, of which one fails, one hangs, and one ends: the record and the exit code."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "it.py").write_text(SCRIPT)
    parts = {
        name: Part("It", 2 if name == "hang" else 30, lambda record: Report(record, "It", [])) for name in ("fail", "hang", "end")
    }
    line = {name: ["it.py", "--do", name, "--beats", tmp_path / "beats"] for name in parts}
    fakes = {"commands": lambda *_: line, "PARTS": parts, "NEED_NO_DATA": set(parts), "ROOT": tmp_path}
    for name, fake in (fakes | {"device_name": lambda *, dry: "Some GPU 9"}).items():
        monkeypatch.setattr(gpu_bench, name, fake)
    work, out = str(tmp_path / "work"), str(tmp_path / "out")
    return lambda seconds: run_main(main, Config(out=out, work=work, commit="c0ffee", seconds=seconds))[::2]


def test_a_part_that_fails_or_hangs_is_ended_with_all_that_it_started(tmp_path, run_parts):
    record, code = run_parts(100.0)
    assert code == 1 and [part["status"] for part in record["parts"].values()] == ["failed", "failed", "ok"]
    assert record["parts"]["fail"]["why"] == "exit code 1: it is broken"
    assert record["parts"]["hang"]["why"].startswith("not done after 2 s") and record["parts"]["hang"]["seconds"] < 30
    assert all(part["found"] == {"figure": 42} for part in record["parts"].values())  # what each wrote before
    beats = tmp_path / "beats"
    written = beats.stat().st_size if beats.exists() else 0
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)  # takes many times as long as it is between two beats
    assert (beats.stat().st_size if beats.exists() else 0) == written


def test_what_no_longer_fits_is_skipped(run_parts):
    record, code = run_parts(24.0)  # of which 5 are kept for the end
    assert code == 0 and [part["status"] for part in record["parts"].values()] == ["skipped"] * 3


def test_parts_that_need_patches_bring_them():
    assert chosen_parts(["threads", "check"]) == ["data", "check", "threads"]
    assert chosen_parts(["loss", "pretraining"]) == ["loss", "pretraining"]
    assert chosen_parts([]) == list(PARTS)


# What the parts are called with


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_command_that_its_script_takes(tmp_path, name, dry):
    """Its flags and their values, without running it."""
    (tmp_path / "images-8-shards").mkdir()
    setting = Setting(tmp_path, dry, str(tmp_path / "set"), "c0ffee")
    script, *arguments = map(str, commands(setting)[name])
    module = importlib.import_module(Path(script).stem)
    parser = build_parser(module.Config, prog=script, description="", exit_on_error=False)
    values = parser.parse_args(arguments if name == "data" else [*arguments, "--out", "out"])
    if name == "check":
        assert values["data"] == str(tmp_path / "images-8-shards")
    if name == "pretraining":
        assert values["data"] == str(tmp_path / "set")
    assert values.get("device", "cpu" if dry else "cuda") == ("cpu" if dry else "cuda")
    assert values.get("dry") in ((dry,) if name in ("check", "pretraining") else (None, False))  # others are given their sizes


# The check


def test_on_a_cpu_nothing_differs_from_the_cpu_and_a_failed_check_leaves_the_others(tmp_path, run_main, monkeypatch, shards):
    """All checks on 12 patches, with several DALI pipelines each."""

    def broken(setup):
        yield "half", {"of": "it"}
        raise KeyError("it broke")

    monkeypatch.setattr(gpu_check, "CHECKS", (broken, *gpu_check.CHECKS))
    record, _, code = run_main(gpu_check.main, gpu_check.Config(str(shards), str(tmp_path), image_size=32, dry=True))
    assert code == 1 and record["failed"] == {"broken": "KeyError: 'it broke'"} and record["found"].pop("half") == {"of": "it"}
    identical = [value.pop("identical") for value in record["found"].values() if "identical" in value]
    assert identical == [True] * 6 and len(record["found"]) == 12
    assert all(number == 0 for value in record["found"].values() for number in value.values())
    assert gpu_check.difference([np.zeros(4)], [np.array([0, 0, 0, 8])])["mean"] == 2
    one, other = torch.zeros(2, 2, 2, 3, 8, 8)
    other[0, 1, 0, 0, 0] = 1.0
    assert not gpu_check.identity(one, other)["identical"] and gpu_check.identity(one, other)["views"] == 0.25


@pytest.mark.faults
def test_a_dry_run(tmp_path, run_script):
    """Runs the parts that take least; `make gpu-bench DRY=1` runs all of them."""
    done = run_script("gpu_bench.py", "--out", tmp_path, "--dry", "--parts", "loss", "two-pass", timeout=230)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-gpu-bench-cpu.json")
    parts = json.loads(path.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(("data", "loss", "two-pass"), "ok")
    text = path.with_suffix(".md").read_text()
    assert "| batch 16 in micro-batches of 1, float32, channels last |" in text and "| 2N = 64: ours | " in text
    assert path.with_suffix(".log").stat().st_size > 0
