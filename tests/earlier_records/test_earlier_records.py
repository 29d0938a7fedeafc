"""Shard sets, runs and studies that earlier code made still open, go on and are reported.

records.tar.xz was made at commit 09dfffb by the commands that stand in its run.json files: 45 patches of 24 px in three
classes, `test_convnext` from a file of zeros (so that weights and checkpoints compress to nothing), one pretraining that is
finished and one that was killed at its sixth step, evaluations, features, and a study. Nothing in it is ever made anew.
"""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sharding.build_config import packed_by
from sharding.inspect_shards import InspectConfig
from sharding.inspect_shards import main as inspect_shards
from sharding.manifest import read_dataset, read_manifest
from sharding.packing import build_shards
from train.config import EmbedConfig, EvaluateConfig, PretrainConfig
from train.records.runs import Run
from train.reporting.report_writer import write_report
from train.stages.embedding import embed
from train.stages.evaluation import evaluate
from train.stages.pretraining import pretrain
from tune.grid import GridConfig
from tune.grid import main as run_grid

RECORDS = Path(__file__).with_name("records.tar.xz")
MADE_IN = "/data"  # where it lay, as its files say

PRETRAIN = {
    "data": "shards",
    "backbone": "test_convnext",
    "init": "zeros.safetensors",
    "image_size": 32,
    "batch_size": 8,
    "projection_dim": 4,
    "optimizer": "sgd",
    "learning_rate": 1e-3,
    "precision": "fp32",
    "workers": 0,
    "threads": 1,
    "log_every": 1,
    "probe_every": 1,
}
EVALUATE = {"data": "shards", "backbone": "kidney", "threads": 1, "draws": 50}


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    """The records, unpacked; the working directory lies in them, as when they were made."""
    with tarfile.open(RECORDS) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".yaml") and MADE_IN in (text := path.read_text()):
            path.write_text(text.replace(MADE_IN, str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_shard_set(records, capsys):
    assert read_manifest("shards").num_rows == 45
    inspect_shards(InspectConfig(shards="shards", verify=True))
    assert "종양 (tumour)" in capsys.readouterr().out
    (command,) = packed_by("shards")
    assert "--group-by slide" in command and "--where magnification=x40" in command


def build(**changes):
    given = {"layout": "{class}/{slide}/{magnification}/{name}", "group_by": "slide", "split": "train=0.6,test=0.4"}
    return build_shards(["images"], "shards", where=["magnification=x40"], **given | changes)


def test_a_shard_set_built_again_is_left_as_it_is(records):
    before = contents(records / "shards")
    assert build().was_there
    assert contents(records / "shards") == before


def test_a_shard_set_is_the_same_bytes_today(records):
    """Not only found to be equal: whoever builds it anew gets the same set."""
    before = contents(records / "shards")
    shutil.rmtree("shards")
    build()
    now = contents(records / "shards")
    assert now.keys() == before.keys()
    assert {name for name in now if now[name] != before[name]} <= {"dataset.json"}
    assert read_dataset("shards")["files"] == json.loads(before["dataset.json"])["files"]


def test_a_shard_set_grows(records):
    extra = records / "images" / "benign" / "S b9" / "x40"
    extra.mkdir(parents=True)
    shutil.copy(records / "images" / "benign" / "S b0" / "x40" / "patch x40 (0).jpg", extra / "new.jpg")
    with open(extra / "new.jpg", "ab") as file:
        file.write(b"\0")  # other bytes, the same picture
    before = read_manifest("shards")["sha256"].to_pylist()
    build(append=True)
    after = read_manifest("shards")["sha256"].to_pylist()
    assert after[:45] == before and len(after) == 46


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        (pretrain, PretrainConfig(**PRETRAIN, name="kidney", epochs=2)),
        (evaluate, EvaluateConfig(**EVALUATE, name="linear", fraction=[0.5, 1.0], seeds=2)),
        (evaluate, EvaluateConfig(**EVALUATE, name="knn", mode="knn")),
        (
            evaluate,
            EvaluateConfig(**EVALUATE, name="finetuned", mode="finetune", epochs=2, workers=0, image_size=32, batch_size=8),
        ),
    ],
    ids=["pretrain", "linear", "knn", "finetune"],
)
def test_a_finished_run_is_found_finished(records, capsys, stage, config):
    before = contents(records / "runs" / config.name)
    run = stage(config)
    assert "finished already" in capsys.readouterr().out
    assert contents(run.folder) == before


def test_a_run_that_differs_is_refused(records):
    with pytest.raises(ValueError, match=r"kidney.*temperature 0\.5 \(now 0\.1\)"):
        pretrain(PretrainConfig(**PRETRAIN, name="kidney", epochs=2, temperature=0.1))
    with pytest.raises(ValueError, match=r"kidney.*schedule cosine \(now constant\)"):
        pretrain(PretrainConfig(**PRETRAIN, name="kidney", epochs=2, schedule="constant"))


def test_a_killed_run_goes_on(records, capsys):
    run = pretrain(PretrainConfig(**PRETRAIN, name="cut off", epochs=3, checkpoint_every=2))
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert rows[3]["patches_per_s"] == 46.31  # step 4, before the kill
    assert run.finished and (run.folder / "backbone.safetensors").exists()
    said = capsys.readouterr().out
    assert "cut off: resuming from step 4\n" in said and "random weights" not in said and "step 4/9" not in said


def test_features_are_found(records, capsys):
    before = contents(records / "features")
    embed(EmbedConfig(data="shards", backbone="kidney", out="features", threads=1))
    assert "to do" not in capsys.readouterr().out
    assert contents(records / "features") == before


def test_cached_features_are_used(records, monkeypatch):
    """A new evaluation of the old backbone reads the features that an earlier one left."""
    monkeypatch.setattr("train.stages.feature_cache.compute_features", lambda *_, **__: pytest.fail("computed again"))
    run = evaluate(EvaluateConfig(**EVALUATE, name="again", fraction=[0.5], seeds=1))
    earlier = Run("runs/linear").result["cells"][0]
    found = run.result["cells"][0]["metrics"]
    assert found["confusion"] == earlier["metrics"]["confusion"]
    for name in ("accuracy", "auroc", "balanced_accuracy", "log_loss"):
        # Up to rounding: the classifier is fitted here, and was on another kind of CPU.
        assert found[name] == pytest.approx(earlier["metrics"][name], rel=1e-9)


def test_reports(records):
    names = ["kidney", "linear", "knn", "finetuned"]
    text = write_report([Run(f"runs/{name}") for name in names], records / "report.html").read_text()
    assert all(name in text for name in names) and "</html>" in text


def test_a_study(records, capsys):
    before = {name: data for name, data in contents(records / "study-runs").items() if not name.endswith("report.html")}
    run_grid(GridConfig(study="study.yaml", without_ray=True))
    out = capsys.readouterr().out
    assert "0.333" in out or "0.400" in out
    now = contents(records / "study-runs")
    assert {name: now[name] for name in before} == before
    assert (records / "study.html").exists()
    assert pq.read_table("study-tables/linear.parquet").num_rows > 0


def test_the_weights_are_read(records):
    from safetensors.numpy import load_file

    weights = load_file("runs/kidney/backbone.safetensors")
    assert len(weights) > 50 and not any(np.any(weight) for weight in weights.values())
    assert os.path.getsize(RECORDS) < 400_000
