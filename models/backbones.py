"""Backbones by their timm names: images (B, 3, S, S) -> features (B, F)."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import timm
import torch
from timm.models import parse_model_name
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn


def build_backbone(name: str, image_size: int) -> nn.Module:
    """A timm model without its classifier and with fresh weights, drawn from torch's global generator.

    name: a name of `timm.list_models()`, such as resnet18 or vit_small_patch16_224; or `hf-hub:OWNER/MODEL` or `local-dir:FOLDER`
    for a model whose architecture the file config.json there describes.
    image_size: the side of the square input images, in pixels.

    Returns a module (B, 3, S, S) -> (B, F) in training mode, with F as `.num_features` and S as `.image_size`. Weights are
    never downloaded; of a model on the hub, config.json is.

    Raises ValueError for a name that timm does not know (with the nearest ones), and for a size that the model cannot take.
    """
    backbone = create_timm_model(name, image_size, pretrained=False)
    backbone.num_features = _features(backbone, name, image_size)  # type: ignore[assignment]
    backbone.image_size = image_size  # type: ignore[assignment]
    return backbone


def create_timm_model(name: str, image_size: int | None, *, pretrained: bool) -> nn.Module:
    """timm.create_model without the classifier. image_size, in pixels, is passed on to models that are built for one size
    (None: the model's own).

    Raises ValueError for a name that timm does not know; the caller handles errors of downloading weights.
    """
    # Position embeddings and windows fit one size. Convolutional models take any and refuse the argument.
    arguments: dict[str, Any] = {"img_size": image_size} if _has_fixed_input_size(name) and image_size is not None else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"backbone {name} cannot be built for images of {image_size} px: {message_of(error)}") from error


def _has_fixed_input_size(name: str) -> bool:
    """Whether the model is built for one image size. Raises ValueError for a name that timm cannot resolve."""
    try:
        source, place = parse_model_name(name)
    except ValueError as error:
        raise ValueError(f"backbone {name!r}: {error}") from None
    if source is None:
        if not timm.is_model(name):
            raise ValueError(f"backbone {name!r} is not known to timm {timm.__version__}{_nearest(name)}")
        try:
            registered = timm.models.get_pretrained_cfg(name)
        except RuntimeError as error:
            raise ValueError(
                f"backbone {name!r}: {error} Leave out what follows the dot, or see timm.list_pretrained()"
            ) from None
        return registered is not None and registered.fixed_input_size
    if source == "local-dir" and not os.path.isabs(place):
        raise ValueError(f"backbone {name!r}: give the folder's absolute path, because each worker runs in another folder")
    try:
        if source == "hf-hub":
            with no_retries_when_offline():
                config, architecture, _ = load_model_config_from_hf(place)
        else:
            config, architecture, _ = load_model_config_from_path(place)
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:  # the last two: other JSON than timm writes
        advice = (
            "check the name and the connection, or give a copy on disk as local-dir:FOLDER"
            if source == "hf-hub"
            else "give the folder of a model saved for timm (config.json and model.safetensors)"
        )
        raise ValueError(f"backbone {name!r}: its config.json cannot be read ({one_line(error)}): {advice}") from error
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"backbone {name!r} is of architecture {architecture!r}, which timm {timm.__version__} does not know")
    registered = timm.models.get_pretrained_cfg(architecture)
    return config.get("fixed_input_size", False) or (registered is not None and registered.fixed_input_size)


def message_of(error: BaseException) -> str:
    """An error's message in one line without addresses in memory, or its type where it has no text."""
    return re.sub(r" at 0x[0-9a-f]+(?=>)", "", " ".join(str(error).split())) or type(error).__name__


def one_line(error: BaseException) -> str:
    """The first sentence of an error's message."""
    return message_of(error).split(". ")[0]


@contextlib.contextmanager
def no_retries_when_offline() -> Iterator[None]:
    """Switch Hugging Face's client to its cache if the hub does not answer one request.

    On its own it requests each of several files six times, which takes a minute.
    """
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    if not before:
        try:
            huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:  # whatever the HTTP library in use raises when there is no answer
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _features(backbone: nn.Module, name: str, image_size: int) -> int:
    """The width F, by trying one image: for some families `num_features` differs from the output width without the classifier."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", (1,))[0]
    if image_size % patch:  # timm would leave out the last rows and columns without a word
        raise ValueError(f"backbone {name} cannot take images of {image_size} px: choose a multiple of {patch}, its patch size")
    backbone.eval()  # one image is no batch to normalise over, and running statistics must stay untouched
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"backbone {name} cannot take images of {image_size} px ({message_of(error)}): choose another size"
        ) from error
    backbone.train()
    if features.ndim != 2:
        raise ValueError(f"backbone {name} gives features of shape {tuple(features.shape[1:])}, not one vector: choose another")
    return features.shape[1]


def _nearest(name: str) -> str:
    # A bare part of a name ("vit", "resnet") is as likely as a slip of the finger.
    models = timm.list_models()
    near = difflib.get_close_matches(name, models, n=4, cutoff=0.6) or [model for model in models if name and name in model][:4]
    return f": did you mean {', '.join(near)}?" if near else ": timm.list_models() lists those it knows"
