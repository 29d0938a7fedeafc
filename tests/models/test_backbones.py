import pytest
import torch

from models.backbones import build_backbone
from models.heads import LinearHead, ProjectionHead
from models.weights import weights_hash
from train.trainer.loop import ViewModel


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


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("resnet18", 32),
        ("resnet50", 32),
        ("resnet101", 32),
        ("inception_v3", 75),  # the least that it takes; 299 is its own
        ("inception_resnet_v2", 75),
        ("vit_tiny_patch16_224", 32),
    ],
)
def test_every_parameter_of_a_backbone_and_its_head_is_trained(name, image_size):
    """Two views of two patches through both, and a gradient for every tensor: none is left over of a classifier, say, for
    which ranks would wait in vain."""
    torch.manual_seed(0)
    backbone = build_backbone(name, image_size)
    model = ViewModel(backbone, ProjectionHead(backbone.num_features, 32))
    z_VBD = model(torch.rand(2, 2, 3, image_size, image_size))
    assert z_VBD.shape == (2, 2, 32)
    z_VBD.square().sum().backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), parameter
    assert sum(float(tensor.grad.abs().sum()) for tensor in backbone.parameters()) > 0


def test_a_seed_fixes_the_weights():
    hashes = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        hashes.append(weights_hash(torch.nn.Sequential(build_backbone("resnet18", 32), LinearHead(512, 3))))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet81", r"'resnet81' is not known to timm .*did you mean .*resnet18"),
        ("", "timm.list_models"),
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


@pytest.mark.parametrize("projection_dim", [5, 32, 64, 128])
def test_the_projection_head_is_the_papers(projection_dim):
    head = ProjectionHead(12, projection_dim)
    assert [tuple(p.shape) for p in head.parameters()] == [(12, 12), (projection_dim, 12)]
    x = torch.randn(4, 12)
    torch.testing.assert_close(head(x), (x @ head[0].weight.T).clamp(min=0) @ head[2].weight.T)


@pytest.mark.parametrize("projection_dim", [5, 32, 64, 128])
def test_three_layers_are_those_of_simclr_v2(projection_dim):
    """Each layer without bias and with batch norm, ReLU after the first two, and no shift in the last norm."""
    head = ProjectionHead(12, projection_dim, layers=3)
    wide = (12, 12), (12,), (12,)
    assert [tuple(p.shape) for p in head.parameters() if p.requires_grad] == [
        *wide, *wide, (projection_dim, 12), (projection_dim,)
    ]  # fmt: skip
    x, weights = torch.randn(64, 12), [p for p in head.parameters() if p.ndim == 2]
    wanted = x
    for layer, weight in enumerate(weights):
        y = wanted @ weight.T
        y = (y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt()
        wanted = y.clamp(min=0) if layer < 2 else y
    torch.testing.assert_close(head(x), wanted)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert sum(not p.requires_grad for p in synchronised.parameters()) == 1


def test_heads_refuse_what_cannot_be():
    with pytest.raises(ValueError, match=r"take 2 .* or 3"):
        ProjectionHead(12, 5, layers=4)
    with pytest.raises(ValueError, match="projection_dim 0 must be at least 1"):
        ProjectionHead(12, 0)
    with pytest.raises(ValueError, match="at least 2 classes, not 1"):
        LinearHead(12, 1)


def test_a_classifier_scores_classes():
    head = LinearHead(512, 3)
    assert head(build_backbone("resnet18", 32)(torch.rand(2, 3, 32, 32))).shape == (2, 3)
    assert not head.bias.any()
