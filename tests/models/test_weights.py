import json
import time

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from models.backbones import build_backbone
from models.weights import apply_init, imagenet_weights, load_backbone_weights, save_backbone, weights_hash


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(1)
    return build_backbone("resnet18", 32)


@pytest.fixture
def fresh():
    torch.manual_seed(2)
    return build_backbone("resnet18", 32)


def test_a_saved_backbone_loads_into_timm_and_torchvision(backbone, tmp_path):
    path = save_backbone(backbone.to(memory_format=torch.channels_last), tmp_path / "run", {"name": "신장", "size": 32})
    assert path == tmp_path / "run" / "backbone.safetensors"
    assert json.loads((tmp_path / "run" / "model_card.json").read_text(encoding="utf-8")) == {"name": "신장", "size": 32}
    assert sorted(p.name for p in path.parent.iterdir()) == ["backbone.safetensors", "model_card.json"]
    loaded = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(path))
    assert weights_hash(loaded) == weights_hash(backbone)
    other = torchvision.models.resnet18()
    keys = other.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    other.fc = nn.Identity()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(other.eval()(x), loaded.eval()(x))


@pytest.mark.parametrize(
    ("name", "size", "left_out"),
    [("resnet50", 32, {"fc"}), ("inception_v3", 75, {"fc", "AuxLogits"})],
)
def test_larger_architectures_load_into_torchvision_too(tmp_path, name, size, left_out):
    torch.manual_seed(1)
    saved = build_backbone(name, size)
    path = save_backbone(saved, tmp_path, {})
    other = (
        torchvision.models.get_model(name, weights=None, init_weights=False)
        if name == "inception_v3"
        else (torchvision.models.get_model(name, weights=None))
    )
    keys = other.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert {key.split(".")[0] for key in keys.missing_keys} == left_out
    assert not keys.unexpected_keys
    other.fc = nn.Identity()
    x = torch.rand(2, 3, size, size)
    torch.testing.assert_close(other.eval()(x), saved.eval()(x))


def test_saving_twice_replaces_and_gives_the_same_bytes(backbone, fresh, tmp_path):
    first = save_backbone(backbone, tmp_path, {}).read_bytes()
    save_backbone(fresh, tmp_path / "a.safetensors", {})
    assert save_backbone(backbone, tmp_path / "a.safetensors", {}).read_bytes() == first


def test_wrappers_do_not_show_in_the_file(backbone, tmp_path):
    path = save_backbone(torch.compile(backbone), tmp_path, {})
    assert set(safetensors.torch.load_file(path)) == set(backbone.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "module.encoder."])
def test_files_of_other_trainers_load(backbone, fresh, tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in backbone.state_dict().items() if "num_batches" not in name}
    head = {prefix + "fc.weight": torch.zeros(3, 512), prefix + "fc.bias": torch.zeros(3)}
    other = {"projector.0.weight": torch.zeros(4, 4)}
    torch.save({"state_dict": state | head | other, "epoch": 3}, tmp_path / "checkpoint.pth")
    report = load_backbone_weights(fresh, tmp_path / "checkpoint.pth")
    assert weights_hash(fresh) == weights_hash(backbone)
    assert len(report.loaded) == len(state)
    assert report.head == ("fc.weight", "fc.bias")
    assert report.unused == ("projector.0.weight",)
    assert len(report.missing) == 20
    assert report.lines()[1:3] == [
        "2 tensors of the file's classification head ignored: fc.weight, fc.bias",
        "1 tensors of the file not used by this backbone: projector.0.weight",
    ]


def test_a_run_a_file_and_a_bare_state_dict_load(backbone, tmp_path):
    path = save_backbone(backbone, tmp_path / "run", {})
    torch.save(backbone.state_dict(), tmp_path / "bare.pt")
    for source in (path.parent, path, tmp_path / "bare.pt"):
        torch.manual_seed(3)
        again = build_backbone("resnet18", 32)
        lines = apply_init(again, "resnet18", str(source))
        assert lines[0].endswith(": 120 tensors loaded")
        assert len(lines) == 1
        assert weights_hash(again) == weights_hash(backbone)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_bad_files_are_refused_and_leave_the_backbone_alone(backbone, fresh, tmp_path):
    before = weights_hash(fresh)
    small = nn.Linear(3, 3).state_dict()
    torch.save(small, tmp_path / "other.pt")
    torch.save({"state_dict": backbone.state_dict(), "extra": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(save_backbone(backbone, tmp_path / "run", {}).read_bytes()[:-100])
    (tmp_path / "noise.pth").write_bytes(b"no weights here")
    (tmp_path / "zero.pth").write_bytes(b"")
    (tmp_path / "unfinished").mkdir()
    wider = {name: torch.zeros(*tensor.shape, 2) for name, tensor in backbone.state_dict().items()}
    torch.save(wider, tmp_path / "shapes.pt")
    broken = dict.fromkeys(("layer4.1.conv2.weight", "bn1.running_var"), float("nan"))
    diverged = {name: tensor * broken.get(name, 1) for name, tensor in backbone.state_dict().items()}
    torch.save(diverged, tmp_path / "diverged.pt")
    for name, sentence in {
        "other.pt": "does not match this backbone .*has weight, the backbone conv1.weight",
        "evil.pt": "contains more than tensors",
        "list.pt": "holds a list, not a state dict",
        "cut.safetensors": "not a readable safetensors file",
        "noise.pth": "noise.pth",
        "zero.pth": "not a readable torch file",
        "unfinished": "holds no backbone.safetensors",
        "shapes.pt": r"another architecture or image size: conv1.weight is \(64, 3, 7, 7, 2\) in the file",
        "diverged.pt": r"NaN or infinite \(in 2 of \d+ tensors, such as .*\): the training that wrote it has diverged",
        "nothing.pt": "no such file",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            load_backbone_weights(fresh, tmp_path / name)
    assert weights_hash(fresh) == before


def test_a_smaller_architecture_does_not_fill_a_larger_one(backbone, tmp_path):
    path = save_backbone(backbone, tmp_path, {})
    larger = build_backbone("resnet34", 32)
    with pytest.raises(ValueError, match=r"48 of the backbone's 108 parameters are not in it"):
        load_backbone_weights(larger, path)


def test_a_model_with_a_prefix_among_its_own_names_keeps_it(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(2, 2)

    a, b = Own(), Own()
    torch.save({"module." + name: tensor for name, tensor in a.state_dict().items()}, tmp_path / "own.pt")
    load_backbone_weights(b, tmp_path / "own.pt")
    assert weights_hash(a) == weights_hash(b)


def test_scratch_leaves_the_weights_and_an_unknown_path_is_refused(fresh):
    before = weights_hash(fresh)
    assert apply_init(fresh, "resnet18", "scratch") == ["resnet18: random weights"]
    assert weights_hash(fresh) == before
    with pytest.raises(ValueError, match="give scratch, imagenet, or the path"):
        apply_init(fresh, "resnet18", "imagenett")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that refuses every connection, and an empty cache. Gives the pauses between tries."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_without_a_connection_imagenet_weights_fail_soon_and_say_what_to_do(no_hub, fresh):
    before = weights_hash(fresh)
    with pytest.raises(ValueError, match=r"the ImageNet weights of resnet18 cannot be downloaded .*--init PATH"):
        apply_init(fresh, "resnet18", "imagenet")
    assert no_hub == []
    assert weights_hash(fresh) == before
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_model_without_pretrained_weights_is_said(no_hub):
    with pytest.raises(ValueError, match=r"ImageNet weights of ghostnet_050 cannot be downloaded \(No pretrained weights"):
        imagenet_weights("ghostnet_050")


def test_imagenet_weights_fit_the_backbone(monkeypatch, fresh):
    # As if timm had them: the same call with weights drawn from another seed.
    asked = []

    def create(name, image_size, *, pretrained):
        asked.append((name, image_size, pretrained))
        torch.manual_seed(9)
        return timm.create_model(name, num_classes=0)

    monkeypatch.setattr("models.weights.create_timm_model", create)
    assert apply_init(fresh, "resnet18", "imagenet") == ["resnet18: timm's ImageNet weights loaded, 120 tensors"]
    assert asked == [("resnet18", 32, True)]
    torch.manual_seed(9)
    assert weights_hash(fresh) == weights_hash(timm.create_model("resnet18", num_classes=0))


def test_the_hash_sees_names_shapes_types_and_values():
    def hashed(**tensors):
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_hash(module)

    hashes = [
        hashed(a=torch.zeros(2, 3)),
        hashed(b=torch.zeros(2, 3)),
        hashed(a=torch.zeros(3, 2)),
        hashed(a=torch.zeros(2, 3, dtype=torch.int32)),
        hashed(a=torch.zeros(2, 3, dtype=torch.bfloat16)),
        hashed(a=torch.eye(2, 3)),
        hashed(a=torch.tensor(0.0)),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashed(a=torch.eye(3).T) == hashed(a=torch.eye(3))
