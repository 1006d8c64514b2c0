"""Attention over selected blocks, by definition: a dense mask, a softmax, plain autograd.

    O[t, h] = softmax over s of (q[t, h] . k[s, h // r] * scale) @ v[s, h // r]       (MSA eq. 8)
              s: the visible keys of the blocks selected for t and h

A key or value that is not finite makes every query that reads it NaN, and no other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, dv], blocks [b, 1 | g | h, t, n] -> out [b, t, h,
    dv], lse [b, t, h]."""
    if cu_seqlens_q is None:
        return _one_sequence(q, k, v, blocks, block_size, scale)
    tq, sk = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    parts = zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1), blocks.split(tq, 2), strict=True)
    out, lse = zip(*[_one_sequence(*part, block_size, scale) for part in parts], strict=True)
    return torch.cat(out, 1), torch.cat(lse, 1)


def _one_sequence(q, k, v, blocks, block_size, scale):
    t, h, s = q.shape[1], q.shape[2], k.shape[1]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    spoilt = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    k, v = (x.masked_fill(spoilt[..., None], 0).to(compute) for x in (k, v))
    k, v, spoilt = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v, spoilt))
    blocks = blocks.repeat_interleave(h // blocks.shape[1], 1)

    key = torch.arange(s, device=q.device)
    visible = key <= torch.arange(s - t, s, device=q.device)[:, None]
    chosen = (blocks[..., None] == torch.arange(s // block_size + 1, device=q.device)).any(-2)
    read = visible & chosen[..., key // block_size]

    scores = torch.einsum("bthd,bshd->bhts", q.to(compute), k) * scale
    scores = scores.masked_fill(read & spoilt.transpose(1, 2)[:, :, None], math.nan)
    scores = scores.masked_fill(~read, -math.inf)
    nothing = ~read.any(-1)
    weights = scores.softmax(-1).masked_fill(nothing[..., None], 0)
    out = torch.einsum("bhts,bshd->bthd", weights, v)
    lse = scores.logsumexp(-1).masked_fill(nothing, -math.inf)
    return out.to(q.dtype), lse.transpose(1, 2)
