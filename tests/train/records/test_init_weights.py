"""What a stage starts from."""

import hashlib

import pytest

from models.backbones import build_backbone
from models.weights import save_backbone
from train.config import PretrainConfig
from train.records.init_weights import resolve_init
from train.records.runs import Run, Stage, identity


@pytest.fixture(scope="module")
def tiny():
    return build_backbone("test_resnet", 32)


def make_run(storage, name, *, finished=True, weights=None):
    config = PretrainConfig(data="shards", name=name, backbone="test_resnet")
    run = Run(storage / name)
    run.begin(Stage("pretrain", identity(config), "d" * 64, "scratch"), config, {})
    if weights is not None:
        save_backbone(weights, run.folder, {"backbone": "test_resnet", "chain": ["simclr on kidney"], "image_size": 32})
    if finished:
        run.finish({"kind": "pretrain"}, wall_seconds=1, device="CPU")
    return run


@pytest.mark.parametrize(("init", "chain"), [("scratch", []), ("imagenet", ["ImageNet"])])
def test_words(tmp_path, init, chain):
    parent = resolve_init(init, str(tmp_path), backbone="resnet18")
    assert (parent.source, parent.key, parent.chain, parent.card, parent.run) == (init, init, chain, {}, None)


def test_words_are_not_runs(tmp_path, tiny):
    make_run(tmp_path, "scratch", weights=tiny)
    assert resolve_init("scratch", str(tmp_path)).run is None


@pytest.mark.parametrize("by", ["name", "folder"])
def test_run(tmp_path, tiny, by):
    run = make_run(tmp_path, "kidney", weights=tiny)
    parent = resolve_init("kidney" if by == "name" else str(run.folder), str(tmp_path), backbone="test_resnet")
    assert (parent.source, parent.key) == (str(run.folder), run.record["key"])
    assert (parent.chain, parent.card["image_size"], parent.run.name) == (["simclr on kidney"], 32, "kidney")


def test_file_with_a_card_beside_it(tmp_path, tiny):
    path = save_backbone(tiny, tmp_path / "kept", {"backbone": "test_resnet", "chain": ["a", "b"]})
    parent = resolve_init(str(path), str(tmp_path))
    assert parent.key == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (parent.source, parent.chain, parent.run) == (str(path), ["a", "b"], None)
    assert parent.card["backbone"] == "test_resnet"


def test_file_without_a_card(tmp_path, tiny, monkeypatch):
    """Given by a relative path; it is found from anywhere, as Ray's workers must."""
    path = save_backbone(tiny, tmp_path / "kept", {})
    path.with_name("model_card.json").unlink()
    monkeypatch.chdir(tmp_path)
    parent = resolve_init("kept/backbone.safetensors", "runs", backbone="test_resnet")
    assert (parent.source, parent.chain, parent.card) == (str(path), ["backbone.safetensors"], {})


def test_other_weights_have_another_key(tmp_path):
    one, two = tmp_path / "a.pth", tmp_path / "b.pth"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    assert resolve_init(str(one), "runs").key != resolve_init(str(two), "runs").key


def test_unfinished_run_is_refused(tmp_path, tiny):
    make_run(tmp_path, "kidney", finished=False, weights=tiny)
    with pytest.raises(ValueError, match="not finished") as error:
        resolve_init("kidney", str(tmp_path))
    assert "kidney" in str(error.value)


def test_run_without_a_backbone_is_refused(tmp_path):
    make_run(tmp_path, "linear")
    with pytest.raises(ValueError, match="has no backbone"):
        resolve_init("linear", str(tmp_path))


@pytest.mark.parametrize("kind", ["run", "file"])
def test_wrong_architecture_is_refused(tmp_path, tiny, kind):
    run = make_run(tmp_path, "kidney", weights=tiny)
    init = "kidney" if kind == "run" else str(run.folder / "backbone.safetensors")
    with pytest.raises(ValueError, match="is a test_resnet, not a resnet18: give --backbone test_resnet"):
        resolve_init(init, str(tmp_path), backbone="resnet18")


def test_damaged_card_is_named(tmp_path, tiny):
    run = make_run(tmp_path, "kidney", weights=tiny)
    (run.folder / "model_card.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_card\.json: this file is damaged"):
        resolve_init("kidney", str(tmp_path))


@pytest.mark.parametrize("init", ["kidneey", "no/such/file.pth", "."])
def test_neither_run_nor_file(tmp_path, init, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no run of that name in runs, and no such file; choose scratch, imagenet"):
        resolve_init(init, "runs")
