"""Blocks scored by pooled keys, by definition: every score is written out, nothing is clever.

P[t, h, w] = q[t, h] . k_pooled[w, h // r] * scale       fp32, over windows whose last token is seen
           = softmax of it over those windows            (score "softmax")
P[t, g, w] = sum of P[t, h, w] over the group's heads    (unless per head)
M[t, m]    = max of P[t, w] over the windows w that overlap block m                   (pool "max")
           = sum of P[t, w] * the part of w's tokens that lie in block m              (pool "sum")
S[t]       = the forced blocks, then the best others by (M descending, m ascending), top_k in all
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIDDEN, VISIBLE, FORCED = 0, 1, 2


def pooled_selection(
    q: Tensor,
    k_pooled: Tensor,
    *,
    num_keys: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    **rule,
) -> Tensor:
    """q [b, t, h, d], k_pooled [b, n, g, d] -> int32 [b, g or h, t, top_k]; see the door."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k_pooled = q.to(compute), k_pooled.to(compute)
    if cu_seqlens_q is None:
        return _one_sequence(q, k_pooled, num_keys, **rule)
    parts, first = [], 0
    tq, sk = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    for own, keys in zip(q.split(tq, 1), sk, strict=True):
        n = max(0, (keys - rule["kernel"]) // rule["stride"] + 1)
        parts.append(_one_sequence(own, k_pooled[:, first : first + n], keys, **rule))
        first += n
    return torch.cat(parts, 2)


def _one_sequence(
    q, k_pooled, s, *, kernel, stride, block_size, softmax, pool, per_head, scale, **forced
):
    t, h = q.shape[1:3]
    n, g = k_pooled.shape[1:3]
    first = torch.arange(n, device=q.device) * stride
    position = torch.arange(s - t, s, device=q.device)[:, None]

    p = torch.einsum("bthd,bnhd->bhtn", q, k_pooled.repeat_interleave(h // g, 2)) * scale
    p = p.nan_to_num(-math.inf, neginf=-math.inf)
    p = p.masked_fill(first + kernel - 1 > position, -math.inf)
    if softmax:
        p = p.softmax(-1).nan_to_num(0)  # no window is visible: 0
    if not per_head:
        p = p.unflatten(1, (g, h // g)).sum(2)

    block = torch.arange(math.ceil(s / block_size), device=q.device)[:, None] * block_size
    overlap = (first + kernel).minimum(block + block_size) - first.maximum(block)
    if pool == "sum":
        worth = p @ (overlap.clamp(min=0) / kernel).to(p.dtype).mT
    else:
        least = 0 if softmax else -math.inf
        p = torch.nn.functional.pad(p, (0, 1), value=least)[..., None, :]
        outside = torch.nn.functional.pad(overlap <= 0, (0, 1), value=False)
        worth = p.masked_fill(outside, least).amax(-1)
    return _best_blocks(worth, position // block_size, **forced)


def _best_blocks(worth, own, *, top_k, local_blocks, sink_blocks):
    """worth [b, g, t, m], own block [t, 1] -> int32 [b, g, t, top_k]"""
    m = worth.shape[-1]
    block = torch.arange(m, device=worth.device)
    forced = (block > own - local_blocks) | (block < sink_blocks)
    rank = torch.where(block > own, HIDDEN, torch.where(forced, FORCED, VISIBLE)).expand_as(worth)
    # Two stable sorts: the second keeps the order of the first among equals, so equal scores stay
    # in block order and a forced block never competes by score.
    order = worth.sort(dim=-1, descending=True, stable=True).indices
    ranks = rank.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    kept = order.gather(-1, ranks)[..., :top_k]
    kept = kept.masked_fill(rank.gather(-1, kept) == HIDDEN, m).sort(-1).values
    kept = kept.masked_fill(kept == m, -1)
    return torch.nn.functional.pad(kept, (0, top_k - kept.shape[-1]), value=-1).to(torch.int32)
