"""What each method makes of a batch of outputs."""

import pytest
import torch
from torch import nn

from models.ntxent import nt_xent
from pipelines.recipes import get_recipe
from train.methods import SimCLR, Supervised

LABELS = torch.tensor([0, 2, 1, 2])


def outputs(views, width):
    return torch.randn(views, 4, width, generator=torch.Generator().manual_seed(0))


def test_simclr():
    method, z = SimCLR(projection_dim=8, temperature=0.2), outputs(2, 8)
    assert method.recipe == get_recipe("simclr")
    assert SimCLR(8, 0.2, recipe_name="simclr-mild").recipe == get_recipe("simclr-mild")
    assert method.build_head(32)(torch.zeros(3, 32)).shape == (3, 8)
    assert method.loss(z, LABELS, None) == nt_xent(z, 0.2)
    assert method.loss(z, LABELS, None) != nt_xent(z, 0.5)
    twins = torch.eye(4).expand(2, 4, 4)
    assert method.metrics(twins, LABELS, None)["top1"] == 1.0


@pytest.mark.parametrize("views", [1, 2])
def test_supervised(views):
    """Mean over patches and views, each view with its patch's label."""
    method, z = Supervised(classes=3), outputs(views, 3)
    assert method.recipe.views == 1
    assert method.build_head(32)(torch.zeros(5, 32)).shape == (5, 3)
    wanted = torch.stack([nn.functional.cross_entropy(z[v, b], LABELS[b]) for v in range(views) for b in range(4)]).mean()
    torch.testing.assert_close(method.loss(z, LABELS, None), wanted)
    right = nn.functional.one_hot(LABELS, 3).float().expand(views, 4, 3).clone()
    right[0, 0] = torch.tensor([0.0, 1.0, 0.0])
    assert method.metrics(right, LABELS, None)["train_accuracy"] == pytest.approx(1 - 1 / (4 * views))
