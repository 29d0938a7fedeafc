import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # benchmarks/ is no installed package

import gpu_bench_parts  # noqa: E402
import short_pretraining  # noqa: E402
from gpu_bench_parts import PARTS, Part, Setting, markdown  # noqa: E402
from measuring import RunFailed  # noqa: E402
from short_pretraining import body, table  # noqa: E402

import benchmarks.gpu_bench as command  # noqa: E402

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

    def part(do, seconds=30.0, least=0.0):
        return Part("It", seconds, least, lambda s, _: ["it.py", "--do", do(), "--beats", beats], lambda found: [f"- {found}"])

    made = {
        "first": part(lambda: "end"),
        "second": part(how.read_text, seconds=2.0),
        "last": part(lambda: "end", least=20.0),
    }
    for module in (command, gpu_bench_parts):
        monkeypatch.setattr(module, "PARTS", made)
    monkeypatch.setattr(command, "NEED_NO_DATA", set(made))
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "device_name", lambda *, dry: "CPU" if dry else "Some GPU 9")
    return how, beats


def _main(tmp_path, **settings):
    """The record, the Markdown and the exit code."""
    code = 0
    try:
        command.main(command.Config(out=str(tmp_path / "out"), work=str(tmp_path / "work"), commit="c0ffee", **settings))
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


def test_only_these_parts_in_their_order(tmp_path, parts):
    record, _, code = _main(tmp_path, parts=["last", "first"])
    assert ([*record["parts"]], code) == (["first", "last"], 0)


def test_parts_that_need_patches_bring_them():
    assert command.chosen_parts(["threads", "check"]) == ["data", "check", "threads"]
    assert command.chosen_parts(["loss", "pretraining"]) == ["loss", "pretraining"]
    assert command.chosen_parts([]) == list(PARTS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"parts": ["step", "speed"]}, "no part 'speed'"), ({"data": "no/such/set"}, "--data no/such/set: there is no such folder")],
)
def test_slips_are_told(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        command.main(command.Config(out=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_there_is_a_way_out(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'RuntimeError: no driver' >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(command.sys, "executable", str(python))
    with pytest.raises(ValueError, match=r"no GPU here \(RuntimeError: no driver\): --dry runs the same"):
        command.device_name(dry=False)


# What the parts are called with


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_command_that_its_script_takes(tmp_path, name, dry):
    """Its flags and their values, without running it."""
    import importlib

    from sharding.cli import build_parser

    (tmp_path / "images-8-shards").mkdir()
    setting = Setting(tmp_path, dry, str(tmp_path / "set"), "c0ffee")
    script, *arguments = map(str, PARTS[name].arguments(setting, 33.3))
    module = importlib.import_module(f"benchmarks.{Path(script).stem}")
    parser = build_parser(module.Config, prog=script, description="", exit_on_error=False)
    values = parser.parse_args(arguments if name == "data" else [*arguments, "--out", "out"])
    if name in ("check", "threads"):
        assert values["data"] == str(tmp_path / "images-8-shards")
    if name == "pretraining":
        assert values["data"] == str(tmp_path / "set")
    assert values.get("device", setting.device) == setting.device
    assert values.get("dry") in ((dry,) if name in ("check", "threads") else (None, False))  # the others are given their sizes


def test_a_cut_off_step_is_shown_as_far_as_it_came():
    timed = {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "device": "cuda", "bf16": True, "seconds": 6.0}
    found = {
        "runs": {"loader": [{"img_per_s": 20_000.0, "data_wait": None}], "model": [], "joint": []},
        "images": {"patches": 8192, "drawn": True, "kilobytes": 22.0},
        "timed": timed | {"rounds": 1},
        "missing": {"ray": "not installed: ray"},
        "failed": {},
    }
    record = {"parts": {"step": {"status": "failed", "why": "not done | yet", "command": "python step.py", "found": found}}}
    text = markdown(record, ["# Title", ""])
    assert "| step | failed | - | not done / yet |" in text
    assert "| ours, the loader alone | 20,000 | 20,000 | 0% | - |" in text
    assert "| ours, the model alone | - | - | - | - |" in text
    assert "ours, both, one Ray worker: not installed: ray" in text


def test_a_result_that_cannot_be_shown_sinks_nothing():
    parts = {"loss": {"status": "failed", "command": "python", "found": {"runs": {}}}, "check": {"status": "ok"}}
    text = markdown({"parts": parts}, [])
    assert "This result cannot be shown (KeyError: 'timed'); it is in the JSON file." in text
    assert "| check | ok |" in text


# A short pretraining


def _pretraining(tmp_path, monkeypatch, failing=(), **settings):
    asked = []

    def pretrained(config, data, runs, name, epochs):
        asked.append((name.rpartition("-")[2] if name.endswith("pilot") else "run", epochs))
        return {"epoch_s": 3.0, "epochs": epochs}

    def judged(config, data, runs, weights):
        asked.append((weights if weights in ("scratch", "imagenet") else "pretrained", None))
        if asked[-1][0] in failing:
            raise RunFailed("exit code 2: it cannot be had")
        figure = {"mean": 0.5, "std": None, "low": 0.25, "high": 0.75}
        return {"accuracy": figure, "balanced_accuracy": figure | {"low": None}, "auroc": figure | {"mean": None}, "units": 9}

    monkeypatch.setattr(short_pretraining, "pretrained", pretrained)
    monkeypatch.setattr(short_pretraining, "judged", judged)
    described = {"name": "oral", "fingerprint": "c0ffee", "packed_by": ["python sharding/build.py oral --unlabelled"]}
    monkeypatch.setattr(short_pretraining, "set_of", lambda data: described)
    code = 0
    try:
        short_pretraining.main(short_pretraining.Config(str(tmp_path), str(tmp_path / "out"), data=str(tmp_path), **settings))
    except SystemExit as error:
        code = error.code
    (path,) = (tmp_path / "out").glob("*-short-pretraining.json")
    return asked, json.loads(path.read_text()), code


def test_as_many_epochs_as_fit(tmp_path, monkeypatch):
    asked, record, code = _pretraining(tmp_path, monkeypatch, seconds=31.0)
    assert asked == [("pilot", 2), ("run", 10), ("pretrained", None), ("scratch", None), ("imagenet", None)]
    assert (record["epochs"], code) == (10, 0)
    rows = table(record)[1]
    assert rows[0] == ["pretrained, 10 epochs", "0.500 [0.250, 0.750]", "0.500", "-"]
    assert _pretraining(tmp_path / "other", monkeypatch, epochs=3)[0][0] == ("run", 3)  # no pilot


def test_weights_that_are_not_there_are_said_and_are_no_failure(tmp_path, monkeypatch):
    _, record, code = _pretraining(tmp_path, monkeypatch, failing={"imagenet"})
    assert code == 0
    assert "'oral' was packed by `python sharding/build.py oral --unlabelled` (fingerprint c0ffee)." in body(record)
    assert "| ImageNet (not there: exit code 2: it cannot be had) | - | - | - |" in body(record)
    _, record, code = _pretraining(tmp_path / "other", monkeypatch, failing={"scratch"})
    assert code == 1
    assert "| random weights (FAILED: exit code 2: it cannot be had) | - | - | - |" in body(record)


def test_the_stages_are_run_and_their_figures_found(tmp_path):
    config = short_pretraining.Config(str(tmp_path), backbone="test_resnet", image_size=32, batch_size=16, patches=60)
    data, runs = short_pretraining.drawn(config, tmp_path), tmp_path / "runs"
    found = short_pretraining.pretrained(config, data, runs, "one", 1)
    assert found["epochs"] == 1 and found["steps"] >= 1
    assert found["epoch_s"] == pytest.approx(2 * 16 * found["steps"] / found["img_per_s"], rel=0.01)
    assert found["loss_last"] > 0 and 0 <= found["data_wait"] <= 1
    found = short_pretraining.judged(config, data, runs, "one")
    assert all(0 <= found["accuracy"][name] <= 1 for name in ("low", "mean", "high"))
    with pytest.raises(RunFailed, match="no run of that name"):
        short_pretraining.judged(config, data, runs, "other")


# The command


def test_a_dry_run(tmp_path):
    """The parts that take least; `make gpu-bench DRY=1` has all of them."""
    line = [sys.executable, "benchmarks/gpu_bench.py", "--out", str(tmp_path), "--dry", "--parts", "loss", "two-pass"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=230, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-gpu-bench-cpu.json")
    record = json.loads(path.read_text())
    assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(("data", "loss", "two-pass"), "ok")
    assert set(record["parts"]["loss"]["found"]["summary"]) == {"64"}
    text = path.with_suffix(".md").read_text()
    assert "| batch 4 in micro-batches of 1, fp32, channels last |" in text and "| 64 | " in text
    assert path.with_suffix(".log").stat().st_size > 0
