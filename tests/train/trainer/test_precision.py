"""How steps are computed: what is on by default, and that nothing of it outlives a run."""

import os

import pytest
import torch
from torch import nn

from train.trainer import precision
from train.trainer.precision import backend_settings, compile_model, default_on_cuda

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # the latter is only looked at


def switches():
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize(("choice", "on_cpu", "on_gpu"), [(None, False, True), (True, True, True), (False, False, False)])
def test_on_where_it_helps(choice, on_cpu, on_gpu):
    assert default_on_cuda(choice, CPU) is on_cpu
    assert default_on_cuda(choice, GPU) is on_gpu


@pytest.mark.parametrize(
    ("device", "deterministic", "wanted"),
    [
        (CPU, False, ("highest", False, False, False)),
        (GPU, False, ("high", True, False, False)),
        (CPU, True, ("highest", False, True, True)),
        (GPU, True, ("highest", False, True, True)),
    ],
)
def test_arithmetic_and_its_end(device, deterministic, wanted, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = switches()
    assert before == ("highest", False, False, False)
    found = []

    def fail():
        with backend_settings(device, deterministic=deterministic):
            found.append(switches())
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert found == [wanted]
    assert switches() == before


class Compiled(nn.Module):
    """Notes that it is to be compiled."""

    def compile(self, *_, **__):
        self.was_compiled = True


@pytest.mark.parametrize("choice", [None, True, False])
@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_compiler_that_does_not_work_is_said_unless_it_was_asked_for(choice, works, device, monkeypatch):
    def tried(function):
        def run(x):
            if not works:
                raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

        return run

    monkeypatch.setattr(precision.torch, "compile", tried)
    monkeypatch.setattr(precision.torch, "ones", lambda *_, device: torch.zeros(1))
    model = Compiled()
    found = compile_model(model, choice, device)
    if choice is None and device is GPU and not works:
        assert found == "no: Failed to find C compiler."
    else:
        assert found is (choice or (choice is None and device is GPU))
    assert hasattr(model, "was_compiled") == (found is True)
