"""How far the index is from the attention it must predict, by definition: dense masks, autograd.

    P[t, s, g]  = mean over the group's heads h of softmax over s of (q[t, h] . k[s, g] * scale)
    P'[t, s, g] = softmax over s of (q_index[t, g] . k_index[s] * index_scale)
    loss        = sum over t, g of w[t] KL(sg(P) || P') / (sum of w * groups)     (MSA eqs. 9-10)
                  s: the visible keys of the selected blocks; of every block without a selection

Each head is renormalised on that support first and averaged second; the other order is wrong.
A k_index that is not finite makes every query that reads it NaN, and no other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def index_loss(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    blocks: Tensor | None,
    *,
    block_size: int,
    scale: float,
    index_scale: float,
    row_weights: Tensor | None = None,
    lse: Tensor | None = None,  # would only save time here
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """q [b, t, h, d], k [b, s, g, d], q_index [b, t, g, di], k_index [b, s, di], blocks [b, 1 | g,
    t, n] -> scalar."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    w = torch.ones(q.shape[:2], device=q.device) if row_weights is None else row_weights.detach()
    w = w.to(compute)
    tensors = [q.detach(), k.detach(), q_index, k_index]
    tensors = [x.to(compute) for x in tensors]
    if cu_seqlens_q is None:
        kl = _one_sequence(*tensors, blocks, block_size, scale, index_scale)
    else:
        tq, sk = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        parts = [x.split(n, 1) for x, n in zip(tensors, (tq, sk, tq, sk), strict=True)]
        chosen = [None] * len(tq) if blocks is None else blocks.split(tq, 2)
        each = [
            _one_sequence(*part, block_size, scale, index_scale)
            for part in zip(*parts, chosen, strict=True)
        ]
        kl = torch.cat(each, 1)
    total = w.sum() * k.shape[2]
    return (w[..., None] * kl).sum() / torch.where(total == 0, 1, total)


def _one_sequence(q, k, q_index, k_index, blocks, block_size, scale, index_scale):
    """KL of every query token and group, [b, t, g]."""
    t, h, s, g = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    key = torch.arange(s, device=q.device)
    support = (key <= torch.arange(s - t, s, device=q.device)[:, None])[None, None]
    if blocks is not None:
        chosen = (blocks[..., None] == torch.arange(s // block_size + 1, device=q.device)).any(-2)
        support = support & chosen[..., key // block_size]
    support = support.expand(q.shape[0], g, t, s)

    scores = torch.einsum("btgrd,bsgd->bgrts", q.unflatten(2, (g, h // g)), k) * scale
    scores = scores.masked_fill(~support[:, :, None], -math.inf)
    teacher = scores.softmax(-1).mean(2).masked_fill(~support, 0).detach()

    spoilt = ~k_index.isfinite().all(-1)
    k_index = k_index.masked_fill(spoilt[..., None], 0)
    index_scores = torch.einsum("btgi,bsi->bgts", q_index, k_index) * index_scale
    index_scores = index_scores.masked_fill(spoilt[:, None, None], math.nan)
    log_student = (
        index_scores.masked_fill(~support, -math.inf).log_softmax(-1).masked_fill(~support, 0)
    )
    return (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1).transpose(1, 2)
