"""Contenders of the loss benchmark: each computes NT-Xent and its gradient.

All get the same embeddings, (V=2, B, D) float32 on the device, and return the same loss. The forward and the backward pass are
timed together; memory is the peak beyond the embeddings and their gradient.
"""

import dataclasses
import functools
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import Contender, own_memory, synchronize

_WARM_PATCHES = 4  # of a first run that loads whatever is loaded once


@dataclasses.dataclass(frozen=True)
class Task:
    """anchors: 2N, embeddings of both views; dim: D; timed_s: passes are timed for so long, or a single one that takes longer."""

    anchors: int
    dim: int
    temperature: float
    device: str
    cores: int
    timed_s: float
    seed: int = 42


# (V, B, D) embeddings -> the loss. It is made for batches of B patches: (B, temperature, device) -> Loss
Loss = Callable[[Any], Any]


# ---- Who computes it ----


def ours(patches: int, temperature: float, device: str) -> Loss:
    from models.ntxent import nt_xent

    return lambda z_VBD: nt_xent(z_VBD, temperature)


def plain(patches: int, temperature: float, device: str) -> Loss:
    """The formula as it is usually written: all similarities at once, and a cross entropy that picks the other view."""
    import torch
    import torch.nn.functional as F

    def loss(z_VBD):
        u_MD = F.normalize(z_VBD.flatten(0, 1), dim=1)
        s_MM = (u_MD @ u_MD.T / temperature).fill_diagonal_(-torch.inf)
        positive_M = (torch.arange(2 * patches, device=device) + patches) % (2 * patches)
        return F.cross_entropy(s_MM, positive_M)

    return loss


def lightly(patches: int, temperature: float, device: str) -> Loss:
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(temperature=temperature)
    return lambda z_VBD: criterion(z_VBD[0], z_VBD[1])


def simclr(patches: int, temperature: float, device: str) -> Loss:
    from simclr.modules import NT_Xent

    criterion = NT_Xent(patches, temperature, 1).to(device)
    return lambda z_VBD: criterion(z_VBD[0], z_VBD[1])


# ---- The measurement ----


def measure(make: Callable[[int, float, str], Loss], task: Task) -> dict[str, Any]:
    """seconds: of a forward and backward pass, median of `runs`; peak_bytes: beyond the embeddings and their gradient; loss;
    budget_bytes: half of the device's memory. Or `no_memory`, what was said where it could not be had."""
    import torch

    if task.device == "cuda":
        torch.cuda.empty_cache()  # of those that ran before in the same process
    patches = task.anchors // 2
    warm_VBD = torch.randn(2, _WARM_PATCHES, task.dim).to(task.device).requires_grad_()
    _run(make(_WARM_PATCHES, task.temperature, task.device), warm_VBD)
    # Drawn on the CPU, so that it is the same everywhere.
    z_VBD = torch.randn(2, patches, task.dim, generator=torch.Generator().manual_seed(task.seed)).to(task.device)
    z_VBD.requires_grad_()
    z_VBD.grad = torch.zeros_like(z_VBD)
    budget = _half_of_the_memory(task.device)
    if task.device == "cpu":
        _limit_memory(budget)
    before = _start_of_peak(task.device)
    try:
        criterion = make(patches, task.temperature, task.device)
        seconds, loss = _run(criterion, z_VBD)
        peak = _peak(task.device) - before
        times = [seconds] if seconds >= task.timed_s else []  # otherwise the first one, into fresh memory, is none of them
        while sum(times) < task.timed_s:
            times.append(_run(criterion, z_VBD)[0])
    except (RuntimeError, MemoryError) as error:  # torch's error on the GPU is a RuntimeError too
        said = str(error).strip().splitlines()[0] if str(error).strip() else "MemoryError"
        if not isinstance(error, MemoryError) and not any(words in said for words in ("allocate memory", "out of memory")):
            raise
        return {"no_memory": said, "budget_bytes": budget}
    found = {"seconds": statistics.median(times), "runs": len(times), "first_s": seconds, "peak_bytes": peak}
    return {**found, "loss": loss, "budget_bytes": budget}


def _run(criterion: Loss, z_VBD: Any) -> tuple[float, float]:
    """Seconds, and the loss."""
    synchronize(z_VBD.device.type)
    started = time.perf_counter()
    loss = criterion(z_VBD)
    loss.backward()
    synchronize(z_VBD.device.type)
    return time.perf_counter() - started, loss.item()


def _half_of_the_memory(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1] // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _limit_memory(more_bytes: int) -> None:
    """What asks for more fails to allocate, instead of taking the machine's last."""
    limit = own_memory("VmData") + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _start_of_peak(device: str) -> int:
    """Bytes in use now. From here on the peak is kept."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (Linux, proc_pid_clear_refs(5))
    return own_memory("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return own_memory("VmHWM")


# In the order of the rounds
CONTENDERS = {
    "plain": Contender("plain formula", functools.partial(measure, plain)),
    "ours": Contender("ours", functools.partial(measure, ours)),
    "lightly": Contender("lightly NTXentLoss", functools.partial(measure, lightly)),
    "simclr": Contender("Spijkervet's NT_Xent", functools.partial(measure, simclr)),
}
MEMORY_POWER = {"ours": 1, "plain": 2, "lightly": 2, "simclr": 2}  # of the anchors, by which memory grows
