"""Which blocks a query reads, by definition: every score is written out, nothing is clever.

I[t, s] = (q_index[t] . k_index[s]) * index_scale            fp32; one shared key for all groups
M[t, n] = max of I[t, s] over the visible keys s of block n  (MSA eqs. 6-7)
S[t]    = the forced blocks, then the best others by (M descending, n ascending), top_k in all
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIDDEN, VISIBLE, FORCED = 0, 1, 2


def select_blocks(
    q_index: Tensor,
    k_index: Tensor,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int,
    sink_blocks: int,
    index_scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """q_index [b, t, g, di], k_index [b, s, di] -> int32 [b, g, t, top_k]; see the door."""
    rule = (block_size, top_k, local_blocks, sink_blocks)
    compute = torch.float64 if q_index.dtype == torch.float64 else torch.float32
    q_index, k_index = q_index.detach().to(compute), k_index.detach().to(compute)
    if cu_seqlens_q is None:
        return _one_sequence(q_index, k_index, index_scale, rule)
    tq, sk = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    pairs = zip(q_index.split(tq, 1), k_index.split(sk, 1), strict=True)
    return torch.cat([_one_sequence(q, k, index_scale, rule) for q, k in pairs], 2)


def _one_sequence(q_index, k_index, index_scale, rule):
    block_size, top_k, local_blocks, sink_blocks = rule
    b, t, g, _ = q_index.shape
    s = k_index.shape[1]
    n = math.ceil(s / block_size)
    device = q_index.device

    scores = torch.einsum("btgi,bsi->bgts", q_index, k_index) * index_scale
    position = torch.arange(s - t, s, device=device)[:, None]
    scores = scores.masked_fill(torch.arange(s, device=device) > position, -math.inf)
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    scores = torch.nn.functional.pad(scores, (0, n * block_size - s), value=-math.inf)
    best = scores.view(b, g, t, n, block_size).amax(-1)

    block = torch.arange(n, device=device)
    own = position // block_size
    forced = (block > own - local_blocks) | (block < sink_blocks)
    rank = torch.where(block > own, HIDDEN, torch.where(forced, FORCED, VISIBLE)).expand_as(best)

    # Two stable sorts: the second keeps the order of the first among equals, so equal scores stay
    # in block order and a forced block never competes by score. Sorting numbers, not signs: -0 and
    # +0 are equal here.
    order = best.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(
        -1, rank.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    )
    kept = order[..., :top_k]
    kept = kept.masked_fill(rank.gather(-1, kept) == HIDDEN, n).sort(-1).values
    kept = kept.masked_fill(kept == n, -1)
    return torch.nn.functional.pad(kept, (0, top_k - kept.shape[-1]), value=-1).to(torch.int32)
