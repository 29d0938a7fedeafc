"""The GPU benchmark and its check of correctness."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_bench
import gpu_check
import pytest
from gpu_bench import PARTS, Config, Part, Setting, chosen_parts, commands, main, report_of
from report import Report, markdown

from sharding.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]

# What a part may be: writes what it found, starts a process that writes as long as it lives, and ends, or does not
SCRIPT = """
import json, pathlib, subprocess, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(arguments["--out"])
out.mkdir(parents=True)
(out / "2001-01-01-it.json").write_text(json.dumps({"figure": 42}))
print("it began", flush=True)
if arguments["--do"] == "hang":
    beats = "import sys, time\\nwhile True: open(sys.argv[1], 'a').write('.'); time.sleep(0.01)"
    subprocess.Popen([sys.executable, "-c", beats, arguments["--beats"]])
    time.sleep(600)
if arguments["--do"] == "fail":
    sys.exit("it is broken")
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Three parts of which the second fails in the way of a file `do`, and the place where its process writes."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "it.py").write_text(SCRIPT)
    how, beats = tmp_path / "do", tmp_path / "beats"

    def show(found):
        return Report(found, "It", [f"- {found}"])

    made = {"first": Part("It", 30, 0, show), "second": Part("It", 2, 0, show), "last": Part("It", 30, 20, show)}

    def command(do):
        return ["it.py", "--do", do, "--beats", beats]

    monkeypatch.setattr(
        gpu_bench, "commands", lambda *_: {name: command(how.read_text() if name == "second" else "end") for name in made}
    )
    monkeypatch.setattr(gpu_bench, "PARTS", made)
    monkeypatch.setattr(gpu_bench, "NEED_NO_DATA", set(made))
    monkeypatch.setattr(gpu_bench, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_bench, "device_name", lambda *, dry: "CPU" if dry else "Some GPU 9")
    return how, beats


def _main(tmp_path, **settings):
    """The record, the Markdown and the exit code."""
    code = 0
    try:
        main(Config(out=str(tmp_path / "out"), work=str(tmp_path / "work"), commit="c0ffee", **settings))
    except SystemExit as error:
        code = error.code
    (path,) = (tmp_path / "out").glob("*.json")
    assert path.name.endswith("-gpu-bench-some-gpu-9.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text(), code


def test_a_failed_part_stands_there_with_its_reason_and_the_next_one_runs(tmp_path, parts):
    parts[0].write_text("fail")
    record, text, code = _main(tmp_path)
    assert code == 1
    assert [part["status"] for part in record["parts"].values()] == ["ok", "failed", "ok"]
    second = record["parts"]["second"]
    assert second["why"] == "exit code 1: it is broken" and second["said"] == ["it began", "it is broken"]
    assert second["found"] == {"figure": 42}  # what it wrote before
    assert text.count("- {'figure': 42}") == 3
    assert "| second | failed |" in text and "exit code 1: it is broken |" in text
    assert "Commit c0ffee" in text


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path, parts):
    how, beats = parts
    how.write_text("hang")
    began = time.monotonic()
    record, _, code = _main(tmp_path)
    assert time.monotonic() - began < 60 and code == 1
    assert [part["status"] for part in record["parts"].values()] == ["ok", "failed", "ok"]
    assert record["parts"]["second"]["why"].startswith("not done after 2 s")
    assert record["parts"]["second"]["found"] == {"figure": 42}
    assert record["parts"]["second"]["seconds"] < 30
    written = beats.stat().st_size if beats.exists() else 0
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)  # takes many times as long as it is between two beats
    assert (beats.stat().st_size if beats.exists() else 0) == written


def test_what_no_longer_fits_is_skipped(tmp_path, parts):
    parts[0].write_text("end")
    record, text, code = _main(tmp_path, seconds=24.0)  # of which 5 are kept for the end
    assert [part["status"] for part in record["parts"].values()] == ["ok", "ok", "skipped"]
    assert record["parts"]["last"]["why"].endswith("s were left, and it needs at least 20 s")
    assert "| last | skipped | - | " in text
    assert code == 0  # no part failed


def test_parts_that_need_patches_bring_them():
    assert chosen_parts(["threads", "check"]) == ["data", "check", "threads"]
    assert chosen_parts(["loss", "pretraining"]) == ["loss", "pretraining"]
    assert chosen_parts([]) == list(PARTS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"parts": ["step", "speed"]}, "no part 'speed'"), ({"data": "no/such/set"}, "--data no/such/set: there is no such folder")],
)
def test_user_errors(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        main(Config(out=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()


# What the parts are called with


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_command_that_its_script_takes(tmp_path, name, dry):
    """Its flags and their values, without running it."""
    (tmp_path / "images-8-shards").mkdir()
    setting = Setting(tmp_path, dry, str(tmp_path / "set"), "c0ffee")
    script, *arguments = map(str, commands(setting, 33.3)[name])
    module = importlib.import_module(Path(script).stem)
    parser = build_parser(module.Config, prog=script, description="", exit_on_error=False)
    values = parser.parse_args(arguments if name == "data" else [*arguments, "--out", "out"])
    if name == "check":
        assert values["data"] == str(tmp_path / "images-8-shards")
    if name == "pretraining":
        assert values["data"] == str(tmp_path / "set")
    assert values.get("device", "cpu" if dry else "cuda") == ("cpu" if dry else "cuda")
    assert values.get("dry") in ((dry,) if name in ("check", "pretraining") else (None, False))  # others are given their sizes


def test_a_cut_off_step_is_shown_as_far_as_it_came(head):
    timed = {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "device": "cuda", "bf16": True, "seconds": 6.0}
    found = head | {
        "runs": {"loader": [{"img_per_s": 20_000.0, "data_wait": None}], "model": [], "joint": []},
        "images": {"patches": 8192, "drawn": True, "kilobytes": 22.0},
        "timed": timed | {"rounds": 1},
    }
    parts = {
        "step": {"status": "failed", "why": "not done | yet", "command": "python step.py", "found": found},
        "loss": {"status": "failed", "command": "python", "found": {"runs": {}}},  # a result that cannot be shown sinks nothing
        "check": {"status": "ok"},
    }
    text = markdown(report_of(head | {"parts": parts, "dry": True, "device": "CPU"}))
    assert "| step | failed | - | not done / yet |" in text
    assert "| ours, the loader alone | 20,000 | 20,000 | 0% | - |" in text and "| ours, the model alone | - | - | - | - |" in text
    assert "This result cannot be shown (KeyError: 'timed'); it is in the JSON file." in text and "| check | ok |" in text


# The check


@pytest.fixture
def run_check(run_main):
    def run(out, **settings):
        return run_main(gpu_check.main, gpu_check.Config(out=str(out), dry=True, **settings))

    return run


def test_on_a_cpu_nothing_differs_from_the_cpu(tmp_path, run_check):
    """All four steps on 48 patches, with several DALI pipelines each."""
    record, text, code = run_check(tmp_path)
    steps = record["steps"]
    assert code == 0 and [*steps] == ["environment", "decode", "views", "purity"] and "| purity |" in text
    assert all(result["max"] == 0 and result["same_in_other_batch"] for name, result in steps["decode"].items() if ", " in name)
    assert steps["views"]["simclr, as stored"]["max"] == 0
    assert steps["views"]["colour alone"]["max"] < 0.01  # torch's and Numba's rounding
    assert steps["purity"]["all_identical"]


def test_a_failed_step_is_reported_and_leaves_the_others(tmp_path, run_check, monkeypatch, capfd):
    import gpu_pixels

    monkeypatch.setattr(gpu_pixels, "decode", lambda check, found: found.update(first=1) or {}["it broke"])
    record, _, code = run_check(tmp_path, steps=["decode", "environment"])
    assert code == 1 and {name: step["status"] for name, step in record["steps"].items()} == {
        "environment": "ok",
        "decode": "failed",
    }
    assert record["steps"]["decode"]["first"] == 1 and record["steps"]["decode"]["error"] == "KeyError: 'it broke'"
    assert capfd.readouterr().err.endswith("FAILED: decode\n")
    with pytest.raises(ValueError, match="no step 'modle'"):
        gpu_check.main(gpu_check.Config(out=str(tmp_path), dry=True, steps=["modle"]))


@pytest.mark.faults
def test_a_dry_run(tmp_path, run_script):
    """Runs the parts that take least; `make gpu-bench DRY=1` runs all of them."""
    done = run_script("gpu_bench.py", "--out", tmp_path, "--dry", "--parts", "loss", "two-pass", timeout=230)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-gpu-bench-cpu.json")
    parts = json.loads(path.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(("data", "loss", "two-pass"), "ok")
    text = path.with_suffix(".md").read_text()
    assert "| batch 4 in micro-batches of 1, fp32, channels last |" in text and "| 64 | " in text
    assert path.with_suffix(".log").stat().st_size > 0
