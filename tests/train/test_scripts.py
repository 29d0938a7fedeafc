"""The scripts: each starts in a process of its own, and refuses what a user did wrong."""

import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, assert_refused, call_script, run_python

SCRIPTS = (
    "train/pretrain.py",
    "train/evaluate.py",
    "train/embed.py",
    "train/report.py",
    "train/doctor.py",
    "tune/grid.py",
    "pipelines/preview.py",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script):
    done = run_python(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stderr == ""


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path, small_set):
    """Schedulers send it when a job's time is over. What was trained is kept: the newest checkpoint is whole."""
    command = [sys.executable, str(ROOT / "train/pretrain.py"), "--data", str(small_set), "--name", "x", "--epochs", "1000"]
    command += ["--storage", str(tmp_path), "--backbone", "test_resnet", "--image-size", "16", "--batch-size", "16"]
    command += ["--workers", "0", "--threads", "1", "--log-every", "1", "--probe-every", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        while not any(tmp_path.glob("x/checkpoints/step-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (143, "pretrain.py: interrupted; run the same command again to resume\n")
    assert any(tmp_path.glob("x/checkpoints/step-*"))


def test_pretrain_refuses_a_missing_set(tmp_path):
    done = call_script("train/pretrain.py", "--data", tmp_path / "none", "--name", "x", "--storage", tmp_path / "runs")
    assert_refused(done, "pretrain.py:", str(tmp_path / "none"))
    assert not (tmp_path / "runs").exists()


def test_pretrain_refuses_a_wrong_flag(tmp_path):
    assert_refused(
        call_script("train/pretrain.py", "--data", tmp_path, "--name", "x", "--batch-size", "many"), "batch_size", "many"
    )


@pytest.mark.parametrize("script", ["train/pretrain.py", "sharding/build.py"])
def test_a_config_in_another_encoding_is_refused(tmp_path, script):
    (tmp_path / "config.yaml").write_text("name: café\n", encoding="latin-1")
    done = call_script(script, "--config", tmp_path / "config.yaml")
    assert_refused(done, f"--config {tmp_path / 'config.yaml'}: this file is not text in UTF-8")


def test_a_set_from_the_future_is_refused(tmp_path, small_set):
    import json
    import shutil

    shutil.copytree(small_set, tmp_path / "shards")
    dataset = json.loads((tmp_path / "shards" / "dataset.json").read_text())
    dataset["format_version"] += 1
    (tmp_path / "shards" / "dataset.json").write_text(json.dumps(dataset))
    done = call_script("train/evaluate.py", "--data", tmp_path / "shards", "--storage", tmp_path / "runs")
    assert_refused(done, "has format 3", "upgrade PatchCLR")
    assert not (tmp_path / "runs").exists()


def test_report_refuses_what_is_no_run(tmp_path):
    assert_refused(call_script("train/report.py", "nothing", "--storage", tmp_path), "nothing", "no run of that name")


def test_grid_refuses_a_misspelt_field(tmp_path):
    (tmp_path / "study.yaml").write_text("stages: {a: {pretrain: {data: x, epohs: 3}}}\n")
    assert_refused(
        call_script("tune/grid.py", tmp_path / "study.yaml"), "study.yaml:1: stages: a: pretrain", "epohs", "did you mean epochs?"
    )
