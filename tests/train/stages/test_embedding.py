"""Embeddings as Parquet: every patch once, read by others, gone on with, and never mixed with other ones."""

import json

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import torch

from models.backbones import build_backbone
from pipelines.recipes import get_recipe
from pipelines.shard_reader import ShardReader
from tests.helpers import call_script
from train.config import EmbedConfig
from train.scoring.features import compute_features
from train.stages import embedding, feature_cache
from train.stages.embedding import embed


@pytest.fixture
def config(small_set, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "PART", 40)
    monkeypatch.setattr(embedding, "PART", 40)
    return EmbedConfig(
        data=str(small_set),
        backbone="scratch",
        architecture="test_resnet",
        image_size=32,
        seed=3,
        out=str(tmp_path / "out"),
        threads=1,
        storage=str(tmp_path / "runs"),
    )


def changed(config, **changes):
    return EmbedConfig(**(vars(config) | changes))


def by_hand(small_set, ids):
    torch.manual_seed(3)
    backbone = build_backbone("test_resnet", 32)
    return compute_features(backbone, ShardReader(small_set), ids, recipe=get_recipe("eval"), image_size=32, threads=1)


def test_every_patch_once_for_pyarrow_pandas_and_duckdb(config, small_set):
    out = embed(config)
    files = sorted(out.glob("*.parquet"))
    assert [path.name for path in files] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    reader = ShardReader(small_set)
    table = ds.dataset(files).to_table()
    assert table["id"].to_pylist() == list(range(90))
    for name in ("key", "group", "split", "class"):
        assert table[name].to_pylist() == reader.manifest[name].to_pylist()
    width = table.schema.field("embedding").type.list_size
    found = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    np.testing.assert_allclose(found, by_hand(small_set, np.arange(90)), atol=1e-5)

    frame = pd.concat([pd.read_parquet(path) for path in files])
    np.testing.assert_array_equal(np.stack(frame["embedding"]), found)
    said = duckdb.sql(
        f"""select "group", count(*), avg(embedding[1]) from '{out}/*.parquet' group by "group" order by 1"""
    ).fetchall()
    assert sum(count for _, count, _ in said) == 90
    for group, _, mean in said:
        assert mean == pytest.approx(found[(frame["group"] == group).to_numpy(), 0].mean(), abs=1e-5)
    record = json.loads((out / "embedding.json").read_text())
    assert record["finished"] is True and record["features"] == width and record["patches"] == 90


def test_a_split_alone(config, small_set):
    table = ds.dataset(sorted(embed(changed(config, split="test")).glob("*.parquet"))).to_table()
    assert set(table["split"].to_pylist()) == {"test"}
    assert table["id"].to_pylist() == [id for id, split in enumerate(ShardReader(small_set).manifest["split"].to_pylist())
                                       if split == "test"]  # fmt: skip


def test_what_is_there_is_not_computed_again(config, monkeypatch, capsys):
    out = embed(config)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "part-00001.parquet").unlink()
    seen = []
    real = embedding.compute_parts
    monkeypatch.setattr(
        embedding,
        "compute_parts",
        lambda what, parts, on, title: seen.extend(map(len, parts)) or real(what, parts, on, title=title),
    )
    embed(config)
    assert seen == [40]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    embed(config)
    assert seen == [40] and "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "holds other embeddings \\(weights differ"),
        ({"image_size": 24}, "holds other embeddings \\(image_size differ"),
        ({"split": "test"}, "holds other embeddings \\(data, patches differ"),
        ({"split": "validation"}, "there is no split 'validation'"),
        ({"architecture": None}, "give --architecture"),
        ({"backbone": "nowhere"}, "nowhere: no run of that name"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_changes_nothing(config, changes, words):
    out = embed(config)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=words):
        embed(changed(config, **changes))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_of_other_things_is_left_alone(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        embed(config)
    with pytest.raises(ValueError, match="this is a file"):
        embed(changed(config, out=str(tmp_path / "out" / "notes.txt")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.faults
def test_workers_write_the_same(ray_here, config, tmp_path):
    alone, by_two = embed(config), embed(changed(config, out=str(tmp_path / "two"), workers=2))
    for path in sorted(alone.glob("*.parquet")):
        ours, theirs = (pd.read_parquet(folder / path.name) for folder in (alone, by_two))
        np.testing.assert_allclose(np.stack(ours["embedding"]), np.stack(theirs["embedding"]), atol=1e-5)
        assert ours["key"].tolist() == theirs["key"].tolist()


def test_the_script(config):
    flags = [text for name in ("data", "backbone", "architecture", "image_size", "out") for text in
             (f"--{name.replace('_', '-')}", str(getattr(config, name)))]  # fmt: skip
    done = call_script("train/embed.py", *flags)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == config.out, done.stderr
    again = call_script("train/embed.py", *flags, "--seed", "5")
    assert again.returncode == 2 and "holds other embeddings" in again.stderr
