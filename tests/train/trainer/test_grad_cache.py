"""Two passes over micro-batches against the whole batch at once."""

import contextlib
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.ntxent import nt_xent
from train.trainer.grad_cache import check_micro_batch, grad_cache_backward
from train.trainer.loop import ViewModel

PATCHES = 12
LABELS = torch.arange(PATCHES) % 3


def small_model(*, dropout=0.0, norm=False) -> ViewModel:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5) if norm else nn.Tanh(), nn.Dropout(dropout), nn.Flatten()]
    return ViewModel(nn.Sequential(*layers), nn.Linear(20, 4)).double()


def views_of(patches=PATCHES, views=2) -> torch.Tensor:
    return torch.randn(views, patches, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def contrastive(z_VBD, group=None):
    return nt_xent(z_VBD, 0.2, group)


def cross_entropy(z_VBD, group=None):
    rank = group.rank() if group else 0
    label_B = LABELS[rank * z_VBD.shape[1] :][: z_VBD.shape[1]]
    return nn.functional.cross_entropy(z_VBD.flatten(0, 1), label_B.repeat(len(z_VBD)))


def at_once(model, views, loss_of):
    z_VBD = model(views)
    loss = loss_of(z_VBD)
    loss.backward()
    return loss.detach(), z_VBD.detach()


def gradients(model):
    return [p.grad for p in model.parameters()]


def no_reseeding(number):
    pass


@settings(max_examples=20, deadline=None)
@given(
    micro_batch=st.sampled_from([1, 2, 3, 4, 6, 12]),
    views=st.integers(1, 4),
    loss_of=st.sampled_from([contrastive, cross_entropy]),
)
def test_loss_embeddings_and_gradient_are_those_of_the_whole_batch(micro_batch, views, loss_of):
    views = 2 if loss_of is contrastive else views
    whole, parts = small_model(), small_model()
    expected = at_once(whole, views_of(views=views), loss_of)
    found = grad_cache_backward(parts, views_of(views=views), loss_of, micro_batch=micro_batch, reseed=no_reseeding)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-11, atol=1e-14)
    assert not any(tensor.requires_grad for tensor in found)


class Recording(nn.Module):
    """Keeps what comes out of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.outputs = inner, []

    def forward(self, views):
        self.outputs.append(self.inner(views))
        return self.outputs[-1]


def test_dropout_draws_the_same_in_both_passes_and_anew_in_each_micro_batch():
    model = Recording(small_model(dropout=0.5))
    views = views_of()[:, :1].expand(-1, PATCHES, -1, -1, -1)  # so that nothing but dropout tells patches apart
    grad_cache_backward(model, views, contrastive, micro_batch=4, reseed=lambda number: torch.manual_seed(70 + number))
    first, second = model.outputs[:3], model.outputs[3:]
    assert len(second) == 3
    for before, again in zip(first, second, strict=True):
        assert torch.equal(before, again)
        assert again.requires_grad and not before.requires_grad
    assert not torch.equal(first[0], first[1])


def test_running_statistics_are_updated_once():
    model, plain = small_model(norm=True), small_model(norm=True)
    grad_cache_backward(model, views_of(), contrastive, micro_batch=4, reseed=no_reseeding)
    for part in views_of().split(4, dim=1):
        plain(part)
    assert model.backbone[1].num_batches_tracked == 3
    assert dict(model.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


def test_no_more_than_a_micro_batch_has_a_graph():
    """What is kept for the backward pass, of all forward passes together: never more patches than a micro-batch."""
    held, most = 0, 0

    def pack(tensor):
        nonlocal held, most
        held += tensor.numel()
        most = max(most, held)
        return tensor

    def unpack(tensor):
        nonlocal held
        held -= tensor.numel()
        return tensor

    largest = {}
    for micro_batch in (2, 12):
        held = most = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            grad_cache_backward(small_model(), views_of(), cross_entropy, micro_batch=micro_batch, reseed=no_reseeding)
        largest[micro_batch] = most
    assert largest[2] < largest[12] / 3


def test_views_keep_their_channels_last():
    formats = []

    class Watching(nn.Module):
        def forward(self, views):
            images = views.flatten(0, 1)
            formats.append(images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous())
            return images.mean((2, 3)).unflatten(0, views.shape[:2])

    views = torch.randn(2, 6, 4, 4, 3).permute(0, 1, 4, 2, 3)
    with contextlib.suppress(RuntimeError):  # it has nothing to learn
        grad_cache_backward(Watching(), views, contrastive, micro_batch=2, reseed=no_reseeding)
    assert formats[:3] == [True] * 3


@pytest.mark.parametrize(("micro_batch", "fitting"), [(5, 4), (0, 1), (-3, 1), (24, 12), (7, 6)])
def test_what_does_not_divide_is_refused(micro_batch, fitting):
    with pytest.raises(ValueError, match=rf"--micro-batch {micro_batch} must divide the 12 patches .* try {fitting}$"):
        check_micro_batch(micro_batch, 12)
    check_micro_batch(fitting, 12)
    check_micro_batch(None, 12)


# On several ranks


def one_rank(rank, world_size, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    own = PATCHES // world_size
    results = {}
    for name, loss_of in (("contrastive", contrastive), ("cross_entropy", cross_entropy)):
        model = nn.parallel.DistributedDataParallel(small_model())
        averaged = []
        model.register_comm_hook(averaged, counted)
        views = views_of()[:, rank * own : (rank + 1) * own]
        loss, _ = grad_cache_backward(
            model, views, lambda z, loss_of=loss_of: loss_of(z, dist.group.WORLD), micro_batch=2, reseed=no_reseeding
        )
        results[name] = {"loss": loss, "grads": gradients(model), "averaged": len(averaged)}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Gloo's and autograd's threads may still be ending, and a C++ thread that Python's exit cuts off aborts the process.
    os._exit(0)


def counted(averaged, bucket):
    """DDP's own way to average a bucket of gradients, with a note that it was done."""
    averaged.append(bucket.index())
    tensor = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0])


def test_two_ranks_give_the_gradient_of_one_process_with_the_joint_batch(tmp_path):
    """Each rank is a process that imports torch, which takes 4 s."""
    torch.multiprocessing.spawn(one_rank, args=(2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, loss_of in (("contrastive", contrastive), ("cross_entropy", cross_entropy)):
        model = small_model()
        loss, _ = at_once(model, views_of(), loss_of)
        found = [rank[name] for rank in ranks]
        torch.testing.assert_close(torch.stack([each["loss"] for each in found]).mean(), loss, rtol=1e-12, atol=0)
        for each in found:
            torch.testing.assert_close(each["grads"], gradients(model), rtol=1e-11, atol=1e-14)
            assert each["averaged"] == 1  # of three micro-batches, the last; the model is one bucket
