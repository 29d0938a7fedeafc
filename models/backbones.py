"""Backbones by their timm names: images (B, 3, S, S) -> features (B, F)."""

import difflib
from typing import Any

import timm
import torch
from torch import nn


def build_backbone(name: str, image_size: int) -> nn.Module:
    """A timm model without its classifier and with fresh weights, drawn from torch's global generator.

    name: a name of `timm.list_models()`, such as resnet18, inception_v3, vit_small_patch16_224.
    image_size: the side of the square images it will be given, in pixels.

    Returns a module (B, 3, S, S) -> (B, F) in training mode, with F as `.num_features` and S as `.image_size`. Nothing is
    ever downloaded.

    Raises ValueError for a name that timm does not know (with the nearest ones), and for a size that the model cannot take.
    """
    backbone = create_timm_model(name, image_size, pretrained=False)
    backbone.num_features = _features(backbone, name, image_size)  # type: ignore[assignment]
    backbone.image_size = image_size  # type: ignore[assignment]
    return backbone


def create_timm_model(name: str, image_size: int | None, *, pretrained: bool) -> nn.Module:
    """timm.create_model without classifier, at an image size (None: the model's own) if the model is made for one.

    Raises ValueError for a name that timm does not know; what a failed download raises is the caller's to handle.
    """
    if not timm.is_model(name):
        raise ValueError(f"backbone {name!r} is not known to timm {timm.__version__}{_nearest(name)}")
    arguments: dict[str, Any] = {}
    try:
        config = timm.models.get_pretrained_cfg(name)
        # Position embeddings and windows fit one size. Convolutional models take any and refuse the argument.
        if image_size is not None and config is not None and config.fixed_input_size:
            arguments["img_size"] = image_size
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        raise ValueError(f"backbone {name!r}: {error} Leave out what follows the dot, or see timm.list_pretrained()") from None
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"backbone {name} cannot be built for images of {image_size} px: {error}") from error


def _features(backbone: nn.Module, name: str, image_size: int) -> int:
    """The width F, by trying one image: for some families `num_features` is not what comes out without the classifier."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", (1,))[0]
    if image_size % patch:  # timm would leave out the last rows and columns without a word
        raise ValueError(f"backbone {name} cannot take images of {image_size} px: choose a multiple of {patch}, its patch size")
    backbone.eval()  # one image is no batch to normalise over, and running statistics must stay untouched
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"backbone {name} cannot take images of {image_size} px ({reason}): choose another size") from error
    backbone.train()
    if features.ndim != 2:
        raise ValueError(f"backbone {name} gives features of shape {tuple(features.shape[1:])}, not one vector: choose another")
    return features.shape[1]


def _nearest(name: str) -> str:
    # A bare part of a name ("vit", "resnet") is as likely as a slip of the finger.
    models = timm.list_models()
    near = difflib.get_close_matches(name, models, n=4, cutoff=0.6) or [model for model in models if name and name in model][:4]
    return f": did you mean {', '.join(near)}?" if near else ": timm.list_models() lists those it knows"
