"""Saving and loading weights: files that timm and torchvision read, a model card beside them, and a hash to compare runs."""

import dataclasses
import hashlib
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from torch import nn

from models.backbones import create_timm_model, message_of, no_retries_when_offline, one_line

WEIGHTS_NAME = "backbone.safetensors"
CARD_NAME = "model_card.json"

# Prefixes that wrappers (DDP, torch.compile, other trainers) add to parameter names.
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.")
# Entries under which other trainers' checkpoints keep the weights.
_ENTRIES = ("state_dict", "model_state_dict", "model", "backbone")
_HEADS = ("fc.", "head.", "classifier.", "classif.", "last_linear.")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was loaded from a file; every field but the first lists tensor names."""

    path: str
    loaded: tuple[str, ...]
    head: tuple[str, ...]  # the file's classifier, which a backbone does not have
    unused: tuple[str, ...]  # other tensors that the backbone does not have
    missing: tuple[str, ...]  # buffers that are not in the file and keep their initial values

    def lines(self) -> list[str]:
        """Sentences for the console."""
        lines = [f"{self.path}: {len(self.loaded)} tensors loaded"]
        for names, text in (
            (self.head, "of the file's classification head ignored"),
            (self.unused, "of the file not used by this backbone"),
            (self.missing, "not in the file, left at their initial values"),
        ):
            if names:
                lines.append(f"{len(names)} tensors {text}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
        return lines


def save_backbone(backbone: nn.Module, folder_or_path: str | os.PathLike, card: dict) -> Path:
    """Write the weights and, beside them, the model card, each atomically.

    backbone: as from `build_backbone`, also compiled or wrapped by DDP. folder_or_path: a folder, made if need be, for
    `backbone.safetensors` and `model_card.json`; or a path that ends in .safetensors. card: anything that JSON can hold.

    Returns the path of the weights. They load with `timm.create_model(name, num_classes=0, checkpoint_path=path)`, and for
    architectures that torchvision shares, into torchvision's model with strict=False (its classifier is missing).
    """
    path = Path(folder_or_path)
    if path.suffix != ".safetensors":
        path = path / WEIGHTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cloned, since safetensors refuses tensors that share memory or are channels-last.
    tensors = {
        _strip(name, prefixes=_PREFIXES[:2]): tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in backbone.state_dict().items()
    }
    # The card first, so that weights always have one.
    _write_atomically(path.with_name(CARD_NAME), json.dumps(card, indent=2, ensure_ascii=False).encode() + b"\n")
    _write_atomically(path, safetensors.torch.save(tensors, {"format": "pt"}))
    return path


def load_backbone_weights(backbone: nn.Module, path: str | os.PathLike) -> LoadReport:
    """Load a file's weights into a backbone, in place.

    path: a .safetensors file, a folder that holds `backbone.safetensors` (a run), or a state dict saved by torch.save
    (.pt, .pth, ..., bare or under `state_dict`, `model_state_dict`, `model` or `backbone`; nothing else is unpickled).
    The prefixes `module.`, `_orig_mod.`, `backbone.` and `encoder.` are removed from the file's names.

    Returns a report. Raises ValueError and leaves the backbone unchanged if the file cannot be read, matches nothing, has a
    tensor of another shape or with a value that is not finite, or lacks a parameter of the backbone (which would silently stay
    random).
    """
    path = Path(path)
    own = backbone.state_dict()
    found = {_strip(name, keep=own): tensor for name, tensor in _read_tensors(path).items()}
    loaded = {name: tensor for name, tensor in found.items() if name in own}
    missing = [name for name in own if name not in found]
    if not loaded:
        example = f" (the file has {next(iter(found))}, the backbone {next(iter(own))})" if found and own else ""
        raise ValueError(f"{path} does not match this backbone{example}: give --backbone the architecture it was saved from")
    for name, tensor in loaded.items():
        if tensor.shape != own[name].shape:
            shapes = f"{name} is {tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the backbone"
            raise ValueError(f"{path} is of another architecture or image size: {shapes}; give the one that it was saved from")
    parameters = {name for name, _ in backbone.named_parameters()}
    lacking = [name for name in missing if name in parameters]
    if lacking:
        count = f"{len(lacking)} of the backbone's {len(parameters)} parameters are not in it"
        raise ValueError(f"{path} is of another architecture: {count} ({lacking[0]}, ...); give the one that it was saved from")
    if broken := [name for name, tensor in loaded.items() if not all_finite([tensor])]:
        raise ValueError(
            f"{path} holds weights that are NaN or infinite (in {len(broken)} of {len(loaded)} tensors, such as {broken[0]}): the"
            " training that wrote it has diverged; train again with a smaller learning rate"
        )
    backbone.load_state_dict(loaded, strict=False)
    extra = [name for name in found if name not in own]
    heads = _head_prefixes(backbone)
    return LoadReport(
        path=str(path),
        loaded=tuple(loaded),
        head=tuple(name for name in extra if name.startswith(heads)),
        unused=tuple(name for name in extra if not name.startswith(heads)),
        missing=tuple(missing),
    )


def imagenet_weights(name: str, image_size: int | None = None) -> dict[str, torch.Tensor]:
    """timm's pretrained weights of a backbone, without the classifier, fitted to an image size (None: the model's own).

    Downloaded on first use and kept in Hugging Face's cache, which is used at once when offline.
    Raises ValueError if there are none or they cannot be downloaded.
    """
    way_out = "give a local file instead (--init PATH, a .safetensors or .pth of the same architecture) or --init scratch"
    try:
        with no_retries_when_offline():
            return create_timm_model(name, image_size, pretrained=True).state_dict()
    except (OSError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(f"the ImageNet weights of {name} cannot be downloaded ({one_line(error)}): {way_out}") from error


def apply_init(backbone: nn.Module, name: str, init: str) -> list[str]:
    """Initialise a new backbone's weights, in place. Returns lines for the console that say what was done.

    name: the backbone's timm name. init: `scratch` (as built), `imagenet` (timm's weights), or the path of a file or run as for
    `load_backbone_weights`.

    Raises ValueError if the weights are not available or do not fit.
    """
    if init == "scratch":
        return [f"{name}: random weights"]
    if init == "imagenet":
        size = getattr(backbone, "image_size", None)
        backbone.load_state_dict(imagenet_weights(name, size))
        whose = "its own" if ":" in name else "timm's ImageNet"
        return [f"{name}: {whose} weights loaded, {len(backbone.state_dict())} tensors"]
    if not os.path.exists(init):
        raise ValueError(f"--init {init}: no such file or folder; give scratch, imagenet, or the path of weights or of a run")
    return load_backbone_weights(backbone, init).lines()


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element of any tensor is NaN or infinite. On a GPU it waits for the device once."""
    checks = [tensor.isfinite().all() for tensor in tensors]
    return not checks or bool(torch.stack(checks).all())


def weights_hash(module: nn.Module) -> str:
    """The SHA-256, in hex, over names, types, shapes and bytes of all parameters and (persistent) buffers."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """`weights_hash` of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A view as bytes: numpy knows no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        path = path / WEIGHTS_NAME
        if not path.exists():
            raise ValueError(f"{path.parent} holds no {WEIGHTS_NAME}: is that run finished? give a finished run or a file")
    if not path.exists():
        raise ValueError(f"{path}: no such file; give a .safetensors, a .pth or a run's folder")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({message_of(error)}): save or copy it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} contains more than tensors, and unpickling it is not safe: "
            "load it where it was made and save only its state dict (torch.save(model.state_dict(), ...))"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable torch file ({message_of(error)[:200]}): save it again") from error
    for entry in _ENTRIES:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _strip(name: str, *, keep=(), prefixes: tuple[str, ...] = _PREFIXES) -> str:
    """The name without wrappers' prefixes, unless it is in keep: some models have an `encoder.` of their own."""
    while name not in keep:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name


def _head_prefixes(backbone: nn.Module) -> tuple[str, ...]:
    classifier = (getattr(backbone, "default_cfg", None) or {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return _HEADS + tuple(f"{name}." for name in names)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
