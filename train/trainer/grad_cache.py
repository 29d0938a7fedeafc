"""Batches larger than memory: the loss of the whole batch, with the graph of one micro-batch at a time.

Source: Gao, Zhang, Han, Callan, "Scaling deep contrastive learning batch size under memory limited setup", RepL4NLP 2021
(GradCache), section 3.2.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# V views, B patches of this rank, M of them in a micro-batch, D width of the head's output, S image size


def check_micro_batch(micro_batch: int | None, rank_batch: int) -> None:
    """Raises ValueError unless a rank's share of the batch falls into micro-batches of that many patches."""
    if micro_batch is None or (micro_batch >= 1 and rank_batch % micro_batch == 0):
        return
    fitting = max((m for m in range(1, min(micro_batch, rank_batch) + 1) if rank_batch % m == 0), default=1)
    raise ValueError(
        f"--micro-batch {micro_batch} must divide the {rank_batch} patches that each worker has of a batch: try {fitting}"
    )


def grad_cache_backward(
    model: nn.Module,
    views_VBCSS: torch.Tensor,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    micro_batch: int,
    reseed: Callable[[int], None],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of loss_of(model(views)) to the parameters' `.grad`, with the graph of M patches at a time.

    First all micro-batches are embedded without a graph; then the loss is taken of all embeddings, those of other ranks too,
    and with it its gradient with respect to this rank's; then each micro-batch is embedded again, with a graph, and its part of
    that gradient goes backward. That costs a second forward pass, and equals the whole batch to rounding, as long as the model
    treats each patch alone. With batch norm it does not: statistics are then those of a micro-batch, and so is the result.
    Running statistics are updated by one of the passes only.

    model: (V, M, 3, S, S) -> (V, M, D); of a DistributedDataParallel the ranks are averaged once, in the last backward.
    loss_of: (V, B, D) -> scalar. reseed: called with the micro-batch's number before each forward pass, so that dropout and
    the like draw the same in both. autocast: makes the context of every forward pass and of the loss.

    Returns the loss and the embeddings (V, B, D), without a graph.
    """
    with torch.no_grad(), _unchanged(model):
        parts = [_embed(model, part, k, reseed, autocast) for k, part in enumerate(_parts(views_VBCSS, micro_batch))]
    z_VBD = torch.cat(parts, dim=1).requires_grad_()
    with autocast():
        loss = loss_of(z_VBD)
    (gradient_VBD,) = torch.autograd.grad(loss, z_VBD)
    gradients = gradient_VBD.split(micro_batch, dim=1)
    for k, part in enumerate(_parts(views_VBCSS, micro_batch)):
        waits = isinstance(model, DistributedDataParallel) and k + 1 < len(gradients)
        with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            _embed(model, part, k, reseed, autocast).backward(gradients[k])
    return loss.detach(), z_VBD.detach()


def _embed(model, views_VMCSS, number, reseed, autocast):
    reseed(number)
    # A context of its own each time: autocast keeps the weights that it cast, and those of the first pass have no graph.
    with autocast():
        return model(views_VMCSS)


def _parts(views_VBCSS: torch.Tensor, micro_batch: int) -> Iterator[torch.Tensor]:
    for part in views_VBCSS.split(micro_batch, dim=1):
        # The views one after the other in memory again; unlike `contiguous`, this keeps channels last.
        yield torch.cat(part.unbind(0)).unflatten(0, part.shape[:2])


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """The model's buffers (running statistics) are afterwards what they were before."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
