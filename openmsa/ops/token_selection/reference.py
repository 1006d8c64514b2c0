"""Which tokens a query reads and what the index learns, by definition: every score written out.

I[t, s] = index_scale * sum over j of w[t, j] * relu(q_index[t, j] . k_index[s])      fp32
S[t]    = the visible s, best first by (I descending, s ascending), top_k in all
P[t, s] = sum over all heads h of softmax over s of (q[t, h] . k[s, g] * scale), divided by its sum
loss    = sum over t of row_weight[t] KL(sg(P) || softmax over s of I) / sum of row_weight
          both over the s of S[t], or over every visible s                            (DSA eqs. 1-4)

A k_index that is not finite makes the loss of every query that reads it NaN, and no other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def select_tokens(
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    *,
    top_k: int,
    index_scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """q_index [b, t, hi, di], k_index [b, s, di], head_weights [b, t, hi] -> int32 [b, t, top_k]"""
    compute = torch.float64 if q_index.dtype == torch.float64 else torch.float32
    tensors = [x.detach().to(compute) for x in (q_index, k_index, head_weights)]
    parts = _sequences(tensors, "qkq", cu_seqlens_q, cu_seqlens_k)
    return torch.cat([_select(*part, top_k, index_scale) for part in parts], 1)


def _select(q_index, k_index, head_weights, top_k, index_scale):
    t, s = q_index.shape[1], k_index.shape[1]
    scores = _index_scores(q_index, k_index, head_weights, index_scale)
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    visible = _visible(t, s, q_index.device).expand_as(scores)
    # Two stable sorts, the second by visibility: equal scores keep the order of their tokens.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(
        -1, visible.gather(-1, order).int().sort(dim=-1, descending=True, stable=True).indices
    )
    kept = order[..., :top_k]
    kept = kept.masked_fill(~visible.gather(-1, kept), s).sort(-1).values
    kept = kept.masked_fill(kept == s, -1)
    return torch.nn.functional.pad(kept, (0, top_k - kept.shape[-1]), value=-1).to(torch.int32)


def token_index_loss(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    blocks: Tensor | None,
    *,
    block_size: int,
    scale: float,
    index_scale: float,
    row_weights: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """q [b, t, h, d], k [b, s, g, d], the index as above, blocks [b, 1, t, n] or None -> scalar"""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    w = torch.ones(q.shape[:2], device=q.device) if row_weights is None else row_weights.detach()
    w = w.to(compute)
    tensors = [x.to(compute) for x in (q.detach(), k.detach(), q_index, k_index, head_weights)]
    parts = _sequences(tensors, "qkqkq", cu_seqlens_q, cu_seqlens_k)
    chosen = [blocks] * len(parts)
    if blocks is not None and cu_seqlens_q is not None:
        chosen = blocks.split(cu_seqlens_q.diff().tolist(), 2)
    numbers = (block_size, scale, index_scale)
    kl = torch.cat([_kl(*part, one, *numbers) for part, one in zip(parts, chosen, strict=True)], 1)
    return (w * kl).sum() / torch.where(w.sum() == 0, 1, w.sum())


def _kl(q, k, q_index, k_index, head_weights, blocks, block_size, scale, index_scale):
    """KL of every query token, [b, t]."""
    t, h, s, g = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    support = _visible(t, s, q.device)[None].expand(q.shape[0], t, s)
    if blocks is not None:
        names = torch.arange(s // block_size + 1, device=q.device)
        chosen = (blocks[:, 0, :, :, None] == names).any(-2)
        support = support & chosen[..., torch.arange(s, device=q.device) // block_size]

    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(h // g, 2)) * scale
    heads = scores.masked_fill(~support[:, None], -math.inf).softmax(-1)
    teacher = heads.sum(1).masked_fill(~support, 0)
    teacher = (teacher / teacher.sum(-1, keepdim=True)).masked_fill(~support, 0).detach()

    spoilt = ~k_index.isfinite().all(-1)
    k_index = k_index.masked_fill(spoilt[..., None], 0)
    student = _index_scores(q_index, k_index, head_weights, index_scale)
    student = student.masked_fill(spoilt[:, None], math.nan).masked_fill(~support, -math.inf)
    log_student = student.log_softmax(-1).masked_fill(~support, 0)
    return (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1)


def _index_scores(q_index, k_index, head_weights, index_scale):
    """I [b, t, s], of visible and of future keys."""
    heads = torch.einsum("bthi,bsi->bths", q_index, k_index).relu()
    return (heads * head_weights[..., None]).sum(2) * index_scale


def _visible(t, s, device):
    return torch.arange(s, device=device) <= torch.arange(s - t, s, device=device)[:, None]


def _sequences(tensors, axes, cu_seqlens_q, cu_seqlens_k):
    """The tensors of every sequence; axes: whose tokens each counts, "q" or "k"."""
    if cu_seqlens_q is None:
        return [tensors]
    lengths = {"q": cu_seqlens_q.diff().tolist(), "k": cu_seqlens_k.diff().tolist()}
    split = [x.split(lengths[axis], 1) for x, axis in zip(tensors, axes, strict=True)]
    return list(zip(*split, strict=True))
