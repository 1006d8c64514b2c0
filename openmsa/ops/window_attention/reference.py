"""Attention over a window and sinks, by definition: a dense mask, a softmax, plain autograd.

    O[t, h] = softmax over s of (q[t, h] . k[s, h // r] * scale) @ v[s, h // r]
              s: the visible keys with s > position - window or s < sinks

A key or value that is not finite makes every query that reads it NaN, and no other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, dv] -> out [b, t, h, dv], lse [b, t, h]."""
    rule = (window, sinks, scale)
    if cu_seqlens_q is None:
        return _one_sequence(q, k, v, *rule)
    tq, sk = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    parts = zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1), strict=True)
    out, lse = zip(*[_one_sequence(*part, *rule) for part in parts], strict=True)
    return torch.cat(out, 1), torch.cat(lse, 1)


def _one_sequence(q, k, v, window, sinks, scale):
    t, h, s = q.shape[1], q.shape[2], k.shape[1]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    spoilt = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    k, v = (x.masked_fill(spoilt[..., None], 0).to(compute) for x in (k, v))
    k, v, spoilt = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v, spoilt))

    key = torch.arange(s, device=q.device)
    position = torch.arange(s - t, s, device=q.device)[:, None]
    read = (key <= position) & ((key > position - window) | (key < sinks))

    scores = torch.einsum("bthd,bshd->bhts", q.to(compute), k) * scale
    scores = scores.masked_fill(spoilt.transpose(1, 2)[:, :, None], math.nan)
    scores = scores.masked_fill(~read, -math.inf)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    return out.to(q.dtype), scores.logsumexp(-1).transpose(1, 2)
