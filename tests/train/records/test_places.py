"""Runs that are handed on: --private keeps folders, commands and the host out of every file."""

import platform
import shutil

import pytest

from tests.helpers import tiny_pretraining
from train.config import EvaluateConfig
from train.records.places import last_part, without_places
from train.records.runs import Run
from train.stages.evaluation import evaluate
from train.stages.pretraining import pretrain


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("/data/Kim Minsu/breast", "breast"),
        ("Kim Minsu/breast/", "breast"),
        ("s3://hospital/Kim/breast", "breast"),
        ("/data/Kim/breast=0.5", "breast=0.5"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"),
        ("local-dir:/home/kim/model", "local-dir:model"),
        ("resnet18", "resnet18"),
        ("scratch", "scratch"),
        ("/", "/"),
    ],
)
def test_last_part(place, part):
    assert last_part(place) == part


def test_plain_data_without_places():
    record = {"host": "vm", "at": ["/a/b", "--data=/a/b", "64/128", "s3://x/y"], "n": 3, "of": {"host": 1, "name": "../c d"}}
    assert without_places(record) == {"at": ["b", "--data=b", "64/128", "y"], "n": 3, "of": {"name": "c d"}}


def test_no_file_of_a_private_run_names_a_folder_or_the_host(small_set, tmp_path, monkeypatch):
    """Of a chain: pretraining, its continuation, an evaluation and a fine-tuning. They are resumed and reported as others are."""
    host = "host-of-the-hospital"
    monkeypatch.setattr(platform, "node", lambda: host)
    monkeypatch.setattr("sys.argv", ["train/pretrain.py", "--data", "/data/Kim Minsu"])
    home = tmp_path / "Kim Minsu"
    data = shutil.copytree(small_set, home / "shards" / "breast")
    config = tiny_pretraining(data, home / "runs", epochs=1, probe_every=1, probe_data=str(data), private=True)
    pretrain(config)
    pretrain(tiny_pretraining(data, home / "runs", name="second", epochs=1, init="tiny", private=True))
    settings = {"data": str(data), "storage": str(home / "runs"), "threads": 1, "draws": 10, "private": True}
    evaluate(EvaluateConfig(**settings, name="linear", backbone="second"))
    evaluate(EvaluateConfig(**settings, name="tuned", backbone="second", mode="finetune", epochs=1, image_size=32))
    for path in (home / "runs").rglob("*"):
        if path.is_file() and "tensorboard" not in path.parts:
            data_bytes = path.read_bytes()
            assert b"Kim Minsu" not in data_bytes and host.encode() not in data_bytes, path
    run = Run(home / "runs" / "tiny")
    assert (run.record["data"], run.record["command"]) == ("breast", [])
    assert 'class="views"' in (run.folder / "report.html").read_text()
    before = (run.folder / "result.json").read_bytes()
    assert pretrain(config).result == run.result and (run.folder / "result.json").read_bytes() == before
