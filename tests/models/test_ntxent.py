import math
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.ntxent import alignment_uniformity, contrastive_top1, embedding_std, nt_xent


def slow_nt_xent(z, temperature):
    """Equation 1 and the sum over pairs of Chen et al. 2020, term by term."""
    views, patches, _ = z.shape
    anchors = [(v, b) for b in range(patches) for v in range(views)]

    def sim(i, j):
        return (z[i] @ z[j]) / (z[i].norm() * z[j].norm())

    total = z.new_zeros(())
    for v, b in anchors:
        i, j = (v, b), (1 - v, b)
        denominator = sum((sim(i, k) / temperature).exp() for k in anchors if k != i)
        total = total - ((sim(i, j) / temperature).exp() / denominator).log()
    return total / len(anchors)


def embeddings(patches, width, seed, dtype=torch.float64):
    z = torch.randn(2, patches, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.to(dtype).requires_grad_()


@settings(max_examples=25, deadline=None)
@given(
    patches=st.integers(1, 7),
    width=st.integers(1, 9),
    temperature=st.floats(0.02, 5),
    chunk=st.none() | st.integers(1, 15),
    seed=st.integers(0, 999),
)
def test_loss_and_gradient_are_the_formulas(patches, width, temperature, chunk, seed):
    z = embeddings(patches, width, seed)
    expected = slow_nt_xent(z, temperature)
    loss = nt_xent(z, temperature, chunk=chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    (gradient,) = torch.autograd.grad(3 * loss, z)
    torch.testing.assert_close(
        gradient, 3 * expected_gradient, rtol=1e-8, atol=1e-8 * max(1, expected_gradient.abs().max().item())
    )


def test_gradcheck():
    z = embeddings(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 0.3, chunk=3), z)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_do_not_change_the_result(chunk):
    z = embeddings(32, 16, seed=2)
    whole, parts = nt_xent(z, 0.1, chunk=64), nt_xent(z, 0.1, chunk=chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(whole, z)[0], torch.autograd.grad(parts, z)[0]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_without_a_gradient_the_loss_is_the_same():
    z = embeddings(9, 5, seed=3)
    with torch.no_grad():
        assert nt_xent(z, 0.2) == nt_xent(z.detach(), 0.2) == nt_xent(z, 0.2).detach()


def test_small_temperatures_neither_overflow_nor_vanish():
    z = embeddings(16, 8, seed=4, dtype=torch.float32)
    loss = nt_xent(z, 1e-3)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
    u = nn.functional.normalize(z.detach().double().view(32, 8), dim=1)
    expected = nn.functional.cross_entropy((u @ u.T / 1e-3).fill_diagonal_(-torch.inf), (torch.arange(32) + 16) % 32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_collapsed_embeddings_give_the_loss_of_chance():
    assert nt_xent(torch.ones(2, 50, 8), 0.1).item() == pytest.approx(math.log(2 * 50 - 1), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_under_autocast_the_loss_is_float32(dtype):
    z = embeddings(40, 16, seed=5, dtype=dtype)
    exact = nt_xent(z.detach().double(), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor that an operation gave back."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_similarities():
    z = embeddings(512, 8, seed=6, dtype=torch.float32)
    with LargestTensor() as largest:
        nt_xent(z, 0.1, chunk=16).backward()
    assert largest.bytes == 16 * 1024 * 4


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"temperature 0\.0 must be above 0"):
        nt_xent(torch.ones(2, 3, 4), 0.0)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()


def step(model, x_VBF, group):
    z = model(x_VBF.flatten(0, 1)).view(2, x_VBF.shape[1], -1)
    loss = nt_xent(z, 0.2, group, chunk=5)
    loss.backward()
    return {"loss": loss.detach(), "top1": contrastive_top1(z, group), "grads": [p.grad for p in model.parameters()]}


def joint_batch(patches):
    # The two views are alike, so that some anchors are hits and some are not.
    x = torch.randn(1, patches, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x + 0.4 * torch.randn(2, patches, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def one_rank(rank, world_size, patches, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    model = nn.parallel.DistributedDataParallel(small_model())
    own = patches // world_size
    # Ranks disagree on B: every one of them must refuse, none may hang.
    with pytest.raises(RuntimeError, match="same number of patches"):
        nt_xent(torch.ones(2, 3 if rank else 4, 4), 0.2, dist.group.WORLD)
    result = step(model, joint_batch(patches)[:, rank * own : (rank + 1) * own], dist.group.WORLD)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Gloo's and autograd's threads may still be ending, and a C++ thread that Python's exit cuts off aborts the process.
    os._exit(0)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.faults)])
def test_ranks_give_the_loss_and_the_gradient_of_one_process_with_the_joint_batch(world_size, tmp_path):
    """Each rank is a process that imports torch, which takes 4 s."""
    patches = 24
    expected = step(small_model(), joint_batch(patches), None)
    torch.testing.assert_close(expected["loss"], slow_nt_xent(small_model()(joint_batch(patches)), 0.2).detach())
    torch.multiprocessing.spawn(one_rank, args=(world_size, patches, str(tmp_path)), nprocs=world_size)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for name in ("loss", "top1"):
        mean = torch.stack([result[name] for result in results]).mean()
        torch.testing.assert_close(mean, expected[name], rtol=1e-12, atol=0, check_dtype=False)
    assert 0.1 < expected["top1"] < 0.95
    assert len({result["loss"].item() for result in results}) == world_size  # each rank's anchors are its own
    for result in results:
        for gradient, joint_gradient in zip(result["grads"], expected["grads"], strict=True):
            torch.testing.assert_close(gradient, joint_gradient, rtol=1e-11, atol=1e-14)


def test_contrastive_top1_counts_nearest_other_views():
    z = embeddings(30, 4, seed=7).detach()
    z[1] = z[0] + 0.5 * z[1]
    u = torch.nn.functional.normalize(z.reshape(60, 4), dim=1)
    similarity = (u @ u.T).fill_diagonal_(-1)
    hits = similarity.argmax(1) == (torch.arange(60) + 30) % 60
    assert contrastive_top1(z).item() == pytest.approx(hits.double().mean().item())
    assert contrastive_top1(torch.stack([z[0], 2 * z[0]])).item() == 1
    assert contrastive_top1(torch.ones(2, 30, 4)).item() == 0


def test_alignment_and_uniformity_are_the_formulas():
    z = embeddings(20, 5, seed=8)
    u = torch.nn.functional.normalize(z.detach(), dim=2)
    alignment, uniformity = alignment_uniformity(z)
    assert alignment.item() == pytest.approx((u[0] - u[1]).norm(dim=1).pow(2).mean().item())
    expected = [torch.pdist(view).pow(2).mul(-2).exp().mean().log() for view in u]
    assert uniformity.item() == pytest.approx(torch.stack(expected).mean().item())
    assert [value.item() for value in alignment_uniformity(torch.ones(2, 20, 5))] == pytest.approx([0, 0], abs=1e-5)
    assert alignment_uniformity(embeddings(1, 5, seed=9))[1].isnan()


def test_embedding_std_tells_spread_from_collapse():
    assert embedding_std(embeddings(2000, 32, seed=10)).item() == pytest.approx(1, abs=0.01)
    assert embedding_std(torch.ones(2, 20, 5)).item() == pytest.approx(0, abs=1e-6)
