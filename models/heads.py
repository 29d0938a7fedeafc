"""Heads on a backbone: the projection head of pretraining, and classifiers.

Shapes: B patches, F features of the backbone, D projection width, K classes.
"""

from torch import nn


class ProjectionHead(nn.Sequential):
    """Features (B, F) -> projections (B, D), on which the contrastive loss is computed.

    layers=2: Linear, ReLU, Linear, without biases, hidden width F: the head of SimCLR.
    layers=3: three linear layers without biases, hidden width F, each followed by batch norm, ReLU between them: the
    head of SimCLR v2. As there, the last batch norm has a scale and no shift (here: a shift of 0 that is not trained, as
    SyncBatchNorm knows no norm without one).

    Raises ValueError for another number of layers, or for a width below 1.

    Source: Chen et al. 2020, "A simple framework for contrastive learning of visual representations", section 2.1 and
    appendix B.9; Chen et al. 2020, "Big self-supervised models are strong semi-supervised learners", section 2, and
    github.com/google-research/simclr, which shows the biases and batch norms of the deeper head.
    """

    def __init__(self, features: int, projection_dim: int, layers: int = 2):
        if projection_dim < 1:
            raise ValueError(f"projection_dim {projection_dim} must be at least 1: 32, 64 or 128 is usual")
        if layers == 2:
            modules = [nn.Linear(features, features, bias=False), nn.ReLU(), nn.Linear(features, projection_dim, bias=False)]
        elif layers == 3:
            modules = []
            for width in (features, features):
                modules += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            last = nn.BatchNorm1d(projection_dim)
            last.bias.requires_grad_(False)
            modules += [nn.Linear(features, projection_dim, bias=False), last]
        else:
            raise ValueError(f"a projection head of {layers} layers is not known: take 2 (SimCLR) or 3 (SimCLR v2)")
        super().__init__(*modules)


class LinearHead(nn.Linear):
    """Features (B, F) -> class scores (B, K), not normalised. Weights start small (deviation 0.01), biases at 0.

    Raises ValueError for fewer than two classes.
    """

    def __init__(self, features: int, classes: int):
        if classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, not {classes}: look at the labels of the data")
        super().__init__(features, classes)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)
