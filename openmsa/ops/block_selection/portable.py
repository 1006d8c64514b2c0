"""Block selection in bounded memory: pieces of scores, each reduced to its blocks' maxima.

Scores lie keys first, [s, g * t], so that the maximum over a block runs along rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmsa.ops.ranking import best_blocks
from openmsa.ops.workspace import accumulate_dtype, no_autocast, rows_at_once

# Keys scored at once: one piece of scores and of fp32 keys stays in a CPU's caches.
KEYS_AT_ONCE = 1 << 13


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
    numbers = (block_size, top_k, local_blocks, sink_blocks, index_scale)
    return _select(q_index.detach(), k_index.detach(), *numbers, cu_seqlens_q, cu_seqlens_k)


@torch.library.custom_op("openmsa::portable_select_blocks", mutates_args=())
def _select(
    q_index: Tensor,
    k_index: Tensor,
    block_size: int,
    top_k: int,
    local_blocks: int,
    sink_blocks: int,
    index_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    rule = (block_size, top_k, local_blocks, sink_blocks)
    blocks = _empty(q_index, top_k)
    with no_autocast(q_index):
        if cu_seqlens_q is None:
            _one_problem(q_index, k_index, rule, index_scale, blocks)
        else:
            borders_q, borders_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
            for i in range(len(borders_q) - 1):
                own_q, own_k = slice(*borders_q[i : i + 2]), slice(*borders_k[i : i + 2])
                one = q_index[:, own_q], k_index[:, own_k]
                _one_problem(*one, rule, index_scale, blocks[:, :, own_q])
    return blocks


@_select.register_fake
def _(q_index, k_index, block_size, top_k, *rest):
    return _empty(q_index, top_k)


def _empty(q_index: Tensor, top_k: int) -> Tensor:
    b, t, g, _ = q_index.shape
    return q_index.new_empty(b, g, t, top_k, dtype=torch.int32)


def _one_problem(q_index, k_index, rule, index_scale, blocks):
    """Fill blocks [b, g, t, top_k] for sequences of equal lengths."""
    b, t, g, _ = q_index.shape
    s = k_index.shape[1]
    if 0 in (b, t, g):
        return
    # Twice a piece of scores, and for every block its score and its rank as int32 and int64.
    bytes_per_query = g * (8 * min(s, KEYS_AT_ONCE + rule[0]) + 32 * -(-s // rule[0]))
    # A quarter of the queries at a time at most: early queries then skip most of the keys.
    tokens = min(rows_at_once(bytes_per_query, q_index.device, 64), max(64, -(-t // 4)), t)
    batches = max(1, min(b, rows_at_once(bytes_per_query * tokens, q_index.device)))
    for b0 in range(0, b, batches):
        for t0 in range(0, t, tokens):
            some = slice(b0, b0 + batches), slice(t0, min(t, t0 + tokens))
            position = s - t + some[1].start
            best = _block_scores(q_index[some], k_index[some[0]], rule[0], index_scale, position)
            blocks[some[0], :, some[1]] = best_blocks(best, rule, position)


def _block_scores(q_index, k_index, block_size, index_scale, position):
    """Best visible score of every block up to the last query's own, [b, g, t, n].

    Query i stands at position + i.
    """
    b, t, g, d = q_index.shape
    end = position + t
    n = -(-end // block_size)
    compute = accumulate_dtype(q_index)
    queries = q_index.transpose(1, 2).reshape(b, g * t, d).to(compute)
    best = queries.new_empty(b, n, g * t)
    step = max(1, KEYS_AT_ONCE // block_size) * block_size
    for start in range(0, end, step):
        stop = min(end, start + step)
        scores = _products(k_index[:, start:stop].to(compute), queries).mul_(index_scale)
        _hide_future(scores, start, position, t)
        scores.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        whole = (stop - start) // block_size
        first = start // block_size
        shape = (b, whole, block_size, g * t)
        best[:, first : first + whole] = scores[:, : whole * block_size].view(shape).amax(2)
        if whole * block_size < stop - start:
            best[:, first + whole] = scores[:, whole * block_size :].amax(1)
    return best.view(b, n, g, t).permute(0, 2, 3, 1)


def _products(keys, queries):
    """keys [b, s, d] . queries [b, g * t, d] -> [b, s, g * t]."""
    if queries.shape[1] < 32:  # decoding: a narrow result is computed faster the other way round
        return torch.bmm(queries, keys.mT).mT
    return torch.bmm(keys, queries.mT)


def _hide_future(scores, start, position, t):
    """scores [b, keys from `start`, g * t]: -inf where a key comes after its query."""
    stop = start + scores.shape[1]
    hide = max(start, position + 1)
    if hide >= stop:
        return
    key = torch.arange(hide, stop, device=scores.device)[:, None]
    future = key > torch.arange(position, position + t, device=scores.device)
    last = scores.unflatten(2, (-1, t))[:, hide - start :]
    last.add_(torch.where(future, -math.inf, 0.0).to(scores.dtype)[:, None])
