"""How a device computes a step: fast GPU settings, compilation, and bitwise reproducibility."""

import contextlib
import os
from collections.abc import Iterator

import torch


def default_on_cuda(choice: bool | None, device: torch.device) -> bool:
    """The choice; None is True on a GPU."""
    return device.type == "cuda" if choice is None else choice


def device_name(device: torch.device) -> str:
    """For records and the console."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@contextlib.contextmanager
def backend_settings(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """A block in which a GPU computes fast: float32 products in TF32, and cuDNN tries which of its algorithms are fastest.

    deterministic: only algorithms that give the same bits every time, on any device; an operation that has none raises
    RuntimeError.
    """
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if deterministic:
        # Read when the first product is asked for. One workspace of a fixed size, as cuBLAS's documentation has it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    elif device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[1:3]
        torch.use_deterministic_algorithms(before[3], warn_only=before[4])


def compile_model(model: torch.nn.Module, choice: bool | None, device: torch.device) -> bool | str:
    """Have the model compiled at its first step, if that was chosen; None: on a GPU where the compiler works.

    Returns whether, or why not. A choice of True that does not work raises at the first step.
    """
    if not default_on_cuda(choice, device):
        return False
    if choice is None:
        # The compiler needs things that torch does not bring along, such as a C compiler on each node. Nobody asked for it by
        # name, so a node without them trains all the same.
        try:
            torch.compile(_small)(torch.ones(8, device=device))
        except Exception as error:
            return f"no: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    model.compile()
    return True


def _small(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).relu() * 2
