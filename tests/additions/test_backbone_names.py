"""Backbones that timm names by a prefix, local-dir:FOLDER and hf-hub:OWNER/MODEL, are accepted wherever a backbone is named."""

import huggingface_hub
import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from models.backbones import build_backbone
from models.weights import apply_init, weights_hash
from sharding.cli import parse, run_script
from train.config import EvaluateConfig, PretrainConfig
from train.records.init_weights import resolve_init
from train.records.json_files import read_json
from train.records.provenance import earlier_stages
from train.stages.evaluation import evaluate
from train.stages.pretraining import pretrain


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a model as timm does, config.json and model.safetensors, and returns it with its prefixed name."""

    def save(architecture: str):
        folder = tmp_path_factory.mktemp("model") / architecture
        torch.manual_seed(8)
        model = timm.create_model(architecture, num_classes=5)
        save_for_hf(model, str(folder), safe_serialization=True)
        model.reset_classifier(0)
        return model, f"local-dir:{folder}"

    return save


@pytest.mark.parametrize(("architecture", "size"), [("test_resnet", 48), ("test_vit", 64), ("test_convnext", 64)])
def test_a_local_model_is_built_as_its_architecture_is(saved, architecture, size):
    """The same width, image size and random weights; and its own weights where they are asked for."""
    model, name = saved(architecture)
    torch.manual_seed(0)
    plain = build_backbone(architecture, size)
    torch.manual_seed(0)
    prefixed = build_backbone(name, size)
    assert (prefixed.num_features, prefixed.image_size) == (plain.num_features, size)
    assert weights_hash(prefixed) == weights_hash(plain)
    apply_init(prefixed, name, "imagenet")
    theirs, ours = model.state_dict(), prefixed.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "pos_embed")  # fitted to the image size


def test_it_is_pretrained_and_judged(saved, small_set, tmp_path):
    """About 15 s: one epoch of pretraining, and a supervised epoch under a name that is made from the backbone's."""
    _, name = saved("test_resnet")
    common = ["--data", str(small_set), "--backbone", name, "--image-size", "32", "--epochs", "1", "--threads", "1"]
    common += ["--workers", "0", "--storage", str(tmp_path / "runs"), "--batch-size", "32"]
    pretraining = parse(PretrainConfig, [*common, "--name", "r", "--init", "imagenet"], prog="", description="")
    run = pretrain(pretraining)
    assert read_json(run.folder / "model_card.json", "")["backbone"] == name
    judged = evaluate(parse(EvaluateConfig, [*common, "--mode", "supervised"], prog="", description=""))
    assert judged.result["architecture"] == name
    assert judged.folder.parent == tmp_path / "runs"


def test_the_weights_behind_a_name_are_part_of_the_key(saved, tmp_path):
    """And nobody knows what they learnt from."""
    _, name = saved("test_resnet")
    before = resolve_init("imagenet", str(tmp_path), backbone=name)
    assert before.key == resolve_init("imagenet", str(tmp_path), backbone=name).key != "imagenet"
    assert before.chain == [name] and [stage.kind for stage in earlier_stages(before)] == ["unknown"]
    torch.manual_seed(9)
    save_for_hf(timm.create_model("test_resnet", num_classes=5), name.removeprefix("local-dir:"), safe_serialization=True)
    assert resolve_init("imagenet", str(tmp_path), backbone=name).key != before.key
    plain = resolve_init("imagenet", str(tmp_path), backbone="test_resnet")
    assert (plain.key, plain.chain, earlier_stages(plain)) == ("imagenet", ["ImageNet"], [])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("local-dir:/no/such/folder", "give the folder of a model saved for timm"),
        ("local-dir:models/mine", "give the folder's absolute path"),
        ("hf:timm/resnet18", "Unknown model source 'hf'"),
        ("timm/resnet18.a1_in1k", "Use 'hf-hub:timm/resnet18.a1_in1k'"),
    ],
)
def test_wrong_names_are_refused(name, words):
    with pytest.raises(ValueError, match=r"^backbone") as refused:
        build_backbone(name, 32)
    assert words in str(refused.value)


def test_a_damaged_config_is_refused(saved):
    _, name = saved("test_resnet")
    path = f"{name.removeprefix('local-dir:')}/config.json"
    odd = ['{"architecture": 5}', '{"architecture": "test_resnet", "pretrained_cfg": ["x"]}', "[1]", "null", '"x"']
    for text in ("{", "{}", '{"architecture": "mine"}', *odd):
        with open(path, "w") as file:
            file.write(text)
        with pytest.raises(ValueError, match=r"^backbone 'local-dir:.*(config.json cannot be read|timm .* does not know)"):
            build_backbone(name, 32)


def test_a_model_on_the_hub_is_one_sentence_offline(monkeypatch, tmp_path, small_set, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"^backbone 'hf-hub:a/b': its config.json cannot be read .*give a copy on disk"):
        build_backbone("hf-hub:a/b", 32)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    arguments = ["--data", str(small_set), "--name", "r", "--backbone", "hf-hub:a/b", "--workers", "0", "--batch-size", "32"]
    arguments += ["--storage", str(tmp_path / "runs")]
    assert run_script(pretrain, PretrainConfig, prog="pretrain.py", description="", arguments=arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("pretrain.py: backbone 'hf-hub:a/b'") and "local-dir:FOLDER" in said and said.count("\n") == 1
