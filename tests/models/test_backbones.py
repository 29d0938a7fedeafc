import pytest
import torch

from models.backbones import build_backbone
from models.heads import Classifier, LinearHead, ProjectionHead
from models.weights import weights_hash


@pytest.mark.parametrize(
    ("name", "image_size", "features"),
    [
        ("resnet18", 64, 512),
        ("vit_tiny_patch16_224", 96, 192),
        ("mobilenetv3_small_050", 64, 1024),  # its num_features is not what comes out without a classifier
        ("inception_v3", 96, 2048),
    ],
)
def test_features_come_out_at_the_size_asked_for(name, image_size, features):
    backbone = build_backbone(name, image_size)
    assert backbone.training
    assert backbone.num_features == features
    assert backbone(torch.rand(2, 3, image_size, image_size)).shape == (2, features)


def test_a_seed_fixes_the_weights():
    hashes = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        hashes.append(weights_hash(Classifier(build_backbone("resnet18", 32), 3)))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet81", r"'resnet81' is not known to timm .*did you mean .*resnet18"),
        ("", "timm.list_models"),
        ("hf-hub:timm/resnet18.a1_in1k", "is not known to timm"),
        ("resnet18.nosuchtag", r"Invalid pretrained tag .*Leave out what follows the dot"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_backbone(name, 32)


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 32), ("vit_tiny_patch16_224", 100)])
def test_sizes_that_a_model_cannot_take_are_refused(name, size):
    with pytest.raises(ValueError, match=rf"backbone {name} cannot .* of {size} px"):
        build_backbone(name, size)


def test_the_projection_head_is_the_papers():
    head = ProjectionHead(12, 5)
    assert [tuple(p.shape) for p in head.parameters()] == [(12, 12), (5, 12)]
    x = torch.randn(4, 12)
    torch.testing.assert_close(head(x), (x @ head[0].weight.T).clamp(min=0) @ head[2].weight.T)


def test_three_layers_end_in_batch_norm():
    head = ProjectionHead(12, 5, layers=3)
    z = head(torch.randn(64, 12))
    assert z.shape == (64, 5)
    torch.testing.assert_close(z.mean(0), torch.zeros(5), rtol=0, atol=1e-5)


def test_heads_refuse_what_cannot_be():
    with pytest.raises(ValueError, match=r"take 2 .* or 3"):
        ProjectionHead(12, 5, layers=4)
    with pytest.raises(ValueError, match="projection_dim 0 must be at least 1"):
        ProjectionHead(12, 0)
    with pytest.raises(ValueError, match="at least 2 classes, not 1"):
        LinearHead(12, 1)


def test_a_classifier_scores_classes():
    model = Classifier(build_backbone("resnet18", 32), 3)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert not model.head.bias.any()
