"""NT-Xent, the contrastive loss of SimCLR, over the embeddings of every rank, in bounded memory.

Shapes:
    V  views of a patch (2)              B  patches on this rank         D  projection width
    M  anchors of this rank (2B)         N  anchors of all ranks (2B x ranks)
    C  anchors taken at a time           W  ranks

The anchors of a rank are its first views, then its second views; all anchors are the ranks' anchors in rank order. So the
positive of anchor i of a rank is its anchor (i + B) mod 2B.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Similarities in memory at a time: 64 MiB in float32. On a CPU, more is hardly faster.
_SIMILARITIES = 2**24


def nt_xent(
    z: torch.Tensor, temperature: float, group: dist.ProcessGroup | None = None, *, chunk: int | None = None
) -> torch.Tensor:
    """The normalised temperature-scaled cross entropy of this rank's anchors, against those of all ranks.

    z: (V=2, B, D) projections of this rank's two views, not normalised; row b of both views is the same patch.
    temperature: what cosine similarities are divided by (> 0).
    group: the process group whose ranks give further negatives (`dist.group.WORLD` for all); None: this process alone.
        Every rank must hold the same B.
    chunk: C, anchors taken at a time; None takes as many as keep 64 MiB of similarities. The result differs by rounding only.

    Returns a scalar, float32 (float64 for a float64 z) whatever autocast says: the mean over this rank's 2B anchors of
    -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)), where j is the anchor's other view and k runs over the anchors
    of all ranks. The ranks' mean is the loss of the joint batch, and the gradients that DistributedDataParallel averages
    over the ranks are those of one process with the joint batch.

    Memory beyond the embeddings: two copies of all N embeddings, and C x N similarities. There is no second derivative.

    Raises ValueError when the temperature is not above 0.

    Source: Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual representations",
    ICML 2020, equation 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0: 0.1 to 0.5 is usual")
    with torch.autocast(z.device.type, enabled=False):
        u_MD = _unit_anchors(z)
        u_ND, offset = _gather_anchors(u_MD, group)
        return _MeanCrossEntropy.apply(u_MD, u_ND, temperature, offset, chunk, torch.is_grad_enabled() and z.requires_grad)


def _unit_anchors(z_VBD: torch.Tensor) -> torch.Tensor:
    """(M, D) anchors of unit length, in float32 or float64."""
    assert (z_VBD.ndim, len(z_VBD)) == (3, 2), f"expected (2, B, D) projections, got {tuple(z_VBD.shape)}"
    z_MD = z_VBD.reshape(-1, z_VBD.shape[2])
    return F.normalize(z_MD.to(torch.promote_types(z_VBD.dtype, torch.float32)), dim=1)


def _gather_anchors(u_MD: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, int]:
    """All ranks' anchors (N, D) in rank order, and the row where this rank's own begin."""
    if group is None or group.size() == 1:
        return u_MD, 0
    # Ranks with different B would hang or mix up rows. Checked on the device, without synchronisation.
    own = torch.full((1,), len(u_MD), device=u_MD.device)
    sizes_W = torch.empty(group.size(), dtype=own.dtype, device=own.device)
    dist.all_gather_into_tensor(sizes_W, own, group=group)
    torch._assert_async((sizes_W == own).all(), "every rank must hold the same number of patches in a step")
    return _GatherRows.apply(u_MD, group), group.rank() * len(u_MD)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order. Backward: the sum over ranks of what each sends back to this rank's rows.

    The sum matters: a rank's embedding is a negative in the losses of all other ranks. A backward that takes only this rank's
    slice gives a gradient of another direction, not just another length.
    """

    @staticmethod
    def forward(ctx, x_MD, group):
        ctx.group = group
        x_ND = x_MD.new_empty(len(x_MD) * group.size(), x_MD.shape[1])
        dist.all_gather_into_tensor(x_ND, x_MD.contiguous(), group=group)
        return x_ND

    @staticmethod
    def backward(ctx, g_ND):
        g_MD = g_ND.new_empty(len(g_ND) // ctx.group.size(), g_ND.shape[1])
        dist.reduce_scatter_tensor(g_MD, g_ND.contiguous(), op=dist.ReduceOp.SUM, group=ctx.group)
        return g_MD, None


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean over own anchors of the cross entropy that picks the other view out of all anchors but itself.

    The forward takes C anchors at a time and accumulates the gradient from their similarities at once. Only the gradient, as
    large as the embeddings, is saved for the backward, which scales it. So the similarities are neither kept nor computed twice.
    """

    @staticmethod
    def forward(ctx, u_MD, u_ND, temperature, offset, chunk, with_gradient):
        anchors, columns = len(u_MD), len(u_ND)
        chunk = chunk or max(1, _SIMILARITIES // columns)
        positive_M = (torch.arange(anchors, device=u_MD.device) + anchors // 2) % anchors
        # Divides the embeddings rather than the similarities, which saves a pass over the latter.
        r_MD = u_MD / temperature
        own, others = torch.empty_like(u_MD), torch.zeros_like(u_ND)
        buffer = u_MD.new_empty(min(chunk, anchors) * columns)
        loss_M = u_MD.new_empty(anchors)
        for start in range(0, anchors, chunk):
            rows = slice(start, min(start + chunk, anchors))
            s_CN = buffer[: (rows.stop - start) * columns].view(-1, columns)
            torch.mm(r_MD[rows], u_ND.T, out=s_CN)
            positive_C1 = (positive_M[rows] + offset)[:, None]
            s_CN.diagonal(offset + start).fill_(-torch.inf)  # an anchor is not its own negative
            positive_similarity_C = s_CN.gather(1, positive_C1)[:, 0]
            top_C1 = s_CN.amax(1, keepdim=True)
            e_CN = s_CN.sub_(top_C1).exp_()
            sum_C1 = e_CN.sum(1, keepdim=True)
            loss_M[rows] = (top_C1 + sum_C1.log())[:, 0] - positive_similarity_C
            if with_gradient:
                # d loss_i / d s_ik is the softmax, minus 1 at the positive, which is subtracted below for all rows.
                torch.mm(e_CN, u_ND, out=own[rows]).div_(sum_C1)
                others.addmm_(e_CN.T, u_MD[rows] / sum_C1)
        if with_gradient:
            own -= u_MD[positive_M]
            others[offset : offset + anchors] -= u_MD[positive_M]  # positives are mutual
            scale = 1 / (temperature * anchors)
            ctx.save_for_backward(own.mul_(scale), others.mul_(scale))
        return loss_M.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        own, others = ctx.saved_tensors
        return g * own, g * others, None, None, None, None


@torch.no_grad()
def contrastive_top1(z: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The share of this rank's anchors that are closer to their other view than to any anchor of another patch, 0 to 1.

    z and group as for `nt_xent`; the ranks' mean is that of the joint batch. A tie is a miss, so that embeddings which
    collapsed to one point score 0. Unlike the loss's, its scale does not move with the temperature; it does get harder
    with a larger batch. Returns a scalar on z's device.
    """
    with torch.autocast(z.device.type, enabled=False):
        u_MD = _unit_anchors(z)
        u_ND, offset = _gather_anchors(u_MD, group)
        anchors, columns = len(u_MD), len(u_ND)
        positive_M1 = ((torch.arange(anchors, device=z.device) + anchors // 2) % anchors + offset)[:, None]
        chunk = max(1, _SIMILARITIES // columns)
        hits = torch.zeros((), dtype=torch.int64, device=z.device)
        for start in range(0, anchors, chunk):
            s_CN = u_MD[start : start + chunk] @ u_ND.T
            s_CN.diagonal(offset + start).fill_(-torch.inf)
            at_least_C = (s_CN >= s_CN.gather(1, positive_M1[start : start + chunk])).sum(1)  # the positive itself is one
            hits += (at_least_C == 1).sum()
        return hits / anchors


@torch.no_grad()
def alignment_uniformity(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How close the views of a patch are, and how evenly patches spread over the sphere; for both, lower is better.

    z: (V=2, B, D) projections as for `nt_xent`; only this rank's are looked at. Returns two scalars on z's device:
    alignment, the mean squared distance of a patch's two unit embeddings (0 to 4), and uniformity, the log of the mean of
    exp(-2 squared distance) over pairs of different patches, mean of both views (0: collapsed to a point; NaN for B = 1).

    Source: Wang, Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", ICML 2020, section 4.2 with alpha = 2, t = 2.
    """
    with torch.autocast(z.device.type, enabled=False):
        u_VBD = _unit_anchors(z).view(2, z.shape[1], z.shape[2])
        alignment = (u_VBD[0] - u_VBD[1]).square().sum(1).mean()
        patches = z.shape[1]
        chunk = max(1, _SIMILARITIES // patches)
        sum_V = u_VBD.new_zeros(2)
        for view in range(2):
            for start in range(0, patches, chunk):
                s_CB = u_VBD[view, start : start + chunk] @ u_VBD[view].T
                e_CB = s_CB.sub_(1).mul_(4).exp_()  # |a - b|^2 = 2 - 2 a.b on the unit sphere
                e_CB.diagonal(start).fill_(0)
                sum_V[view] += e_CB.sum()
        return alignment, (sum_V / (patches * (patches - 1))).log().mean() if patches > 1 else alignment * torch.nan


@torch.no_grad()
def embedding_std(z: torch.Tensor) -> torch.Tensor:
    """The standard deviation of unit embeddings times sqrt(D): 1 when spread over the sphere, 0 when collapsed to a point.

    z: (V=2, B, D) projections as for `nt_xent`; only this rank's are looked at. Returns a scalar on z's device.

    Source: Chen, He, "Exploring simple Siamese representation learning", CVPR 2021, section 4.1.
    """
    u_MD = _unit_anchors(z)
    return u_MD.std(0, correction=0).mean() * u_MD.shape[1] ** 0.5
