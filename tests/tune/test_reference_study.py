"""A study of the project's own, whole, in smoke size: the script that a user runs, on drawn patches."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.drawn_patches.dataset import DrawConfig, draw_set
from sharding.packing import build_shards
from tests.helpers import ROOT
from train.records.runs import Run
from tune import random_weights

STUDY = ROOT / "tune" / "studies" / "transfer_chains.yaml"
PUBLISHED = {  # in %, as the study's comment has them
    ("linear", "imagenet-breast"): (75.59, 84.80, 88.79),
    ("linear", "kidney"): (73.62, 77.87, 83.55),
    ("linear", "imagenet-kidney"): (69.64, 79.77, 82.79),
    ("linear", "kidney-breast"): (76.97, 87.50, 89.46),
    ("linear", "imagenet-kidney-breast"): (80.65, 88.96, 91.50),
    ("supervised", ""): (67.10, 83.15, 88.70),
}


@pytest.fixture
def demo(tmp_path) -> Path:
    """A folder with what `make study` has drawn, less of it."""
    for organ, settings in (
        ("kidney", {"layout": "{slide}/{name}", "unlabelled": True}),
        ("breast", {"layout": "{class}/{slide}/{name}", "split": "train=0.7,test=0.3"}),
    ):
        images = tmp_path / "demo" / "images" / organ
        draw_set(DrawConfig(out=str(images), organ=organ, patches=300, size=48, slides=12, seed=1))
        build_shards([images], tmp_path / "demo" / "shards" / organ, group_by="slide", **settings)
    weights = tmp_path / "demo" / "weights" / "random_in_place_of_imagenet.safetensors"
    random_weights.main(random_weights.RandomWeightsConfig(backbone="test_resnet", out=str(weights)))
    return tmp_path


def run_grid(folder: Path, *flags: str) -> str:
    import ray

    done = subprocess.run(
        [sys.executable, str(ROOT / "tune" / "grid.py"), str(STUDY), "--smoke", *flags],
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_the_transfer_chains(ray_here, demo):
    """Eleven trials on Ray, each in a process that imports torch: 40 s of processor time."""
    said = run_grid(demo)
    storage = demo / "runs" / "transfer_chains-smoke"
    with (storage / "report-tables" / "transfer-chains.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["stage"], row["backbone"]) for row in rows} == PUBLISHED.keys() and len(rows) == 18
    for row in rows:
        place = ("0.05", "0.25", "0.5").index(row["fraction"])
        assert row["status"] == "done" and 0 < float(row["mean"]) < 1
        assert float(row["published"]) == pytest.approx(PUBLISHED[row["stage"], row["backbone"]][place] / 100)
    # Two chains share the kidney stage and two share ImageNet -> kidney: five pretrainings, not seven.
    runs = {path.parent.name: Run(path.parent) for path in storage.glob("*/result.json")}
    assert len(runs) == 11 and sum(run.record["stage"]["kind"] == "pretrain" for run in runs.values()) == 5
    assert runs["kidney-breast"].record["stage"]["parent"] == runs["kidney"].record["key"]
    assert runs["linear-backbone-kidney"].record["stage"]["parent"] == runs["kidney"].record["key"]
    assert "No value is" in said and "No value is" in (storage / "report.html").read_text(encoding="utf-8")
    again = run_grid(demo)
    assert again.count("finished already") == 11 and "finished in" not in again
    assert run_grid(demo, "--plan").splitlines()[-1] == "11 of 11 finished"
