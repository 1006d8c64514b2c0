"""Token selection in bounded memory: the best top_k so far against one piece of keys after another.

Beside the scores of a piece no more than top_k tokens of every query are held, so memory is
O(t * k). The order that the definition asks for (score descending, token ascending) becomes one
whole number per token, as in block selection: no two are equal, so ties cannot depend on the
device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmsa.ops.workspace import accumulate_dtype, no_autocast, rows_at_once

# Keys scored at once.
KEYS_AT_ONCE = 1 << 13


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
    tensors = (q_index.detach(), k_index.detach(), head_weights.detach())
    return _select(*tensors, top_k, index_scale, cu_seqlens_q, cu_seqlens_k)


@torch.library.custom_op("openmsa::portable_select_tokens", mutates_args=())
def _select(
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    top_k: int,
    index_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    tokens = _empty(q_index, top_k)
    with no_autocast(q_index):
        if cu_seqlens_q is None:
            _one_problem(q_index, k_index, head_weights, index_scale, tokens)
            return tokens
        borders_q, borders_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for i in range(len(borders_q) - 1):
            own_q, own_k = slice(*borders_q[i : i + 2]), slice(*borders_k[i : i + 2])
            one = q_index[:, own_q], k_index[:, own_k], head_weights[:, own_q]
            _one_problem(*one, index_scale, tokens[:, own_q])
    return tokens


@_select.register_fake
def _(q_index, k_index, head_weights, top_k, *rest):
    return _empty(q_index, top_k)


def _empty(q_index: Tensor, top_k: int) -> Tensor:
    b, t = q_index.shape[:2]
    return q_index.new_empty(b, t, top_k, dtype=torch.int32)


def _one_problem(q_index, k_index, head_weights, index_scale, tokens):
    """Fill tokens [b, t, top_k] for sequences of equal lengths."""
    b, t, heads, _ = q_index.shape
    s, top_k = k_index.shape[1], tokens.shape[2]
    if 0 in (b, t):
        return
    # Scores of every head and of their sum, and of what competes: order and number, twice each.
    piece = min(s, KEYS_AT_ONCE)
    bytes_per_query = 4 * (heads + 2) * piece + 32 * (piece + min(s, top_k))
    wanted = -(-256 // heads)
    # A quarter of the queries at a time at most: early queries then skip most of the keys.
    at_once = min(rows_at_once(bytes_per_query, q_index.device, wanted), max(16, -(-t // 4)), t)
    batches = max(1, min(b, rows_at_once(bytes_per_query * at_once, q_index.device)))
    for b0 in range(0, b, batches):
        for t0 in range(0, t, at_once):
            some = slice(b0, b0 + batches), slice(t0, min(t, t0 + at_once))
            index = q_index[some], k_index[some[0]], head_weights[some]
            tokens[some] = _best_tokens(*index, index_scale, s - t + t0, top_k)


def _best_tokens(q_index, k_index, head_weights, index_scale, position, top_k):
    """int32 [b, t, top_k], ascending, -1 at the end. Query i stands at position + i."""
    t = q_index.shape[1]
    end = position + t
    sums = accumulate_dtype(q_index)
    queries, weights = q_index.to(sums).flatten(1, 2), head_weights.to(sums)[:, :, None]
    order = token = None
    for start in range(0, end, KEYS_AT_ONCE):
        stop = min(end, start + KEYS_AT_ONCE)
        heads = torch.bmm(queries, k_index[:, start:stop].to(sums).mT).relu_()
        scores = (weights @ heads.unflatten(1, (t, -1)))[:, :, 0].mul_(index_scale)
        scores.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        here = torch.arange(start, stop, device=scores.device)
        future = here > torch.arange(position, end, device=scores.device)[:, None]
        rank = _whole_numbers(scores)
        rank.masked_fill_(future, torch.iinfo(rank.dtype).min)
        order, token = _keep(order, token, rank, here.to(torch.int32), top_k)
    # What is hidden came in only where nothing else was left.
    hidden = order == torch.iinfo(order.dtype).min
    kept = torch.where(hidden, end, token).sort(-1).values
    kept.masked_fill_(kept == end, -1)
    return torch.nn.functional.pad(kept, (0, top_k - kept.shape[-1]), value=-1)


def _keep(order, token, rank, here, top_k):
    """The best top_k of the order and tokens [b, t, n] so far and of a piece of keys."""
    here = here.expand_as(rank)
    if order is not None:
        rank, here = torch.cat([order, rank], -1), torch.cat([token, here], -1)
    if rank.shape[-1] <= top_k:
        return rank, here
    if rank.dtype == torch.int32:
        # Below the score the token, so that equal scores prefer the lower one.
        number = (rank.long() << 32) + (2**31 - here.long())
        kept = number.topk(top_k, -1, sorted=False).indices
    else:
        # Equal scores stand in the order of their tokens, and a stable sort leaves them so.
        kept = rank.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return rank.gather(-1, kept), here.gather(-1, kept)


def _whole_numbers(x: Tensor) -> Tensor:
    """int32 (int64 for fp64) in the order of x; -0 and +0 become equal; NaN must be gone."""
    kind = torch.int64 if x.dtype == torch.float64 else torch.int32
    bits = (x + 0.0).contiguous().view(kind)
    # Bits of negative floats ascend with their size; flipping all but the sign turns that around.
    return bits ^ ((bits >> torch.iinfo(kind).bits - 1) & torch.iinfo(kind).max)
