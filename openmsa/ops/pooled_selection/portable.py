"""Blocks scored by pooled keys in bounded memory: some queries against all they see at a time.

A query's scores are a whole row, so a softmax needs no second pass. The windows that overlap block
m are m * step - before ... m * step + step - 1: `step` begin in it, `before` begin earlier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.ops.pooled_selection.windows import num_windows
from openmsa.ops.ranking import best_blocks
from openmsa.ops.workspace import accumulate_dtype, no_autocast, rows_at_once


@dataclass(frozen=True)
class _Rule:
    """The door's numbers."""

    kernel: int
    stride: int
    block_size: int
    top_k: int
    local_blocks: int
    sink_blocks: int
    softmax: bool
    pool: str
    per_head: bool
    scale: float

    @property
    def step(self) -> int:
        return self.block_size // self.stride

    @property
    def before(self) -> int:
        return (self.kernel - 1) // self.stride

    @property
    def ranking(self) -> tuple[int, int, int, int]:
        return self.block_size, self.top_k, self.local_blocks, self.sink_blocks


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
    return _select(q, k_pooled, cu_seqlens_q, cu_seqlens_k, num_keys, **rule)


@torch.library.custom_op("openmsa::portable_pooled_selection", mutates_args=())
def _select(
    q: Tensor,
    k_pooled: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    top_k: int,
    local_blocks: int,
    sink_blocks: int,
    softmax: bool,
    pool: str,
    per_head: bool,
    scale: float,
) -> Tensor:
    forced = local_blocks, sink_blocks
    rule = _Rule(kernel, stride, block_size, top_k, *forced, softmax, pool, per_head, scale)
    blocks = _empty(q, k_pooled, top_k, per_head)
    with no_autocast(q):
        if cu_seqlens_q is None:
            _one_problem(q, k_pooled, num_keys, rule, blocks)
        else:
            borders_q, first = cu_seqlens_q.tolist(), 0
            for i, keys in enumerate(cu_seqlens_k.diff().tolist()):
                own = slice(*borders_q[i : i + 2])
                n = num_windows(keys, kernel, stride)
                windows = k_pooled[:, first : first + n]
                _one_problem(q[:, own], windows, keys, rule, blocks[:, :, own])
                first += n
    return blocks


@_select.register_fake
def _(q, k_pooled, cu_q, cu_k, num_keys, kernel, stride, block_size, top_k, *rest):
    return _empty(q, k_pooled, top_k, per_head=rest[4])


def _empty(q: Tensor, k_pooled: Tensor, top_k: int, per_head: bool) -> Tensor:
    b, t, h, _ = q.shape
    groups = h if per_head else k_pooled.shape[2]
    return q.new_empty(b, groups, t, top_k, dtype=torch.int32)


def _one_problem(q, k_pooled, s, rule, blocks):
    """Fill blocks [b, g or h, t, top_k] for sequences of equal lengths."""
    (b, t, h, d), (n, g) = q.shape, k_pooled.shape[1:3]
    if 0 in (b, t):
        return
    r = h // g
    lists = r if rule.per_head else 1
    # Scores and their sum over heads, those padded and pooled; per block its score and its rank.
    of_scores = (r + 3 * lists) * (n + rule.step + rule.before)
    per_query = of_scores + 10 * lists * -(-s // rule.block_size) + 2 * r * d
    size = 8 if q.dtype == torch.float64 else 4
    at_once = rows_at_once(size * per_query, q.device, wanted=-(-256 // r))
    # A quarter of the queries at most: early queries then skip most of the windows.
    tokens = min(at_once, max(64, -(-t // 4)), t)
    pairs = rows_at_once(size * (tokens * per_query + n * d), q.device)
    groups = min(g, pairs)
    batches = max(1, min(b, pairs // groups))
    for b0 in range(0, b, batches):
        for g0 in range(0, g, groups):
            some, own = slice(b0, b0 + batches), slice(g0, min(g, g0 + groups))
            keys = k_pooled[some, :, own].transpose(1, 2).flatten(0, 1).to(accumulate_dtype(q))
            heads = slice(own.start * lists, own.stop * lists)
            for t0 in range(0, t, tokens):
                here = slice(t0, min(t, t0 + tokens))
                queries = q[some, here].unflatten(2, (g, r))[:, :, own].to(keys.dtype)
                best = _block_scores(queries, keys, rule, s - t + t0)
                blocks[some, heads, here] = best_blocks(best, rule.ranking, s - t + t0)


def _block_scores(queries, keys, rule, position):
    """queries [b, t, g, r, d], keys [b * g, n, d] -> what every block up to the last query's own is
    worth, [b, g or g * r, t, blocks]. Query i stands at position + i."""
    b, t, g, r, d = queries.shape
    seen = min(keys.shape[1], num_windows(position + t, rule.kernel, rule.stride))
    queries = queries.permute(0, 2, 3, 1, 4).reshape(b * g, r * t, d)
    scores = torch.bmm(queries, keys[:, :seen].mT).mul_(rule.scale).view(b, g, r, t, seen)
    scores.nan_to_num_(nan=-math.inf, neginf=-math.inf)
    _hide_future(scores, rule, position)
    if rule.softmax and seen:
        _softmax_(scores)
    scores = scores.flatten(1, 2) if rule.per_head else scores.sum(2)
    return _pooled(scores, rule, -(-(position + t) // rule.block_size))


def _hide_future(scores, rule, position):
    """scores [..., t, windows]: -inf where a window ends after its query."""
    t, seen = scores.shape[-2:]
    hide = min(seen, num_windows(position + 1, rule.kernel, rule.stride))
    last = torch.arange(hide, seen, device=scores.device) * rule.stride + rule.kernel - 1
    future = last > torch.arange(position, position + t, device=scores.device)[:, None]
    scores[..., hide:].masked_fill_(future, -math.inf)


def _softmax_(scores):
    """Over the last axis, in place; a row that sees nothing becomes 0."""
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    scores.div_(total.masked_fill_(total == 0, 1))


def _pooled(scores, rule, blocks):
    """scores [..., windows] -> [..., blocks]"""
    step, before = rule.step, rule.before
    behind = blocks * step - scores.shape[-1]
    least = 0 if rule.softmax else -math.inf
    scores = torch.nn.functional.pad(scores, (before, behind), value=least)
    if rule.pool == "max":
        return scores.unfold(-1, step + before, step).amax(-1)
    worth = scores.new_zeros(*scores.shape[:-1], blocks)
    for i in range(step + before):
        start = (i - before) * rule.stride  # of the window, from the beginning of the block
        inside = min(start + rule.kernel, rule.block_size) - max(start, 0)
        worth.add_(scores[..., i::step][..., :blocks], alpha=inside / rule.kernel)
    return worth
