"""Gathers: every query's own keys laid beside each other, for blocks too short to share.

A tile reads a block once for many queries and repeats a query, with the r heads of its group, for
each of its blocks. Where a block has no more tokens than a group has heads, that repeats more
than it shares: here a query stays, and its keys come to it.

    piece   C queries of one group each, and for every one the K tokens of its blocks
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.ops import tile_scores
from openmsa.ops.tiles import Chunk, chunks
from openmsa.ops.workspace import accumulate_dtype, add_rows, rows_at_once


@dataclass(frozen=True)
class Piece:
    """Some queries and their keys; token numbers count along the key axis."""

    chunk: Chunk
    batch: Tensor  # [C]
    group: Tensor  # [C] group, counted in the whole problem
    token: Tensor  # [C, K] where hidden, the query's own position
    hidden: Tensor  # [C, K] an empty slot, a token in the future, a block named twice

    def queries(self, x: Tensor) -> Tensor:
        """x [b, t, m, d] -> [C, m, d], of a selection with one group."""
        return self.chunk.of(x[:, :, None])

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write values [C, m, d] to where `queries` takes them from."""
        self.chunk.put(x[:, :, None], values)

    def keys(
        self, x: Tensor, head: int | Tensor, dtype: torch.dtype, sound: bool = False
    ) -> tuple[Tensor, ...]:
        """x [b, s, g, d] -> tokens [C, K, d] and, unless x is sound (all of it finite), which of
        them are not finite [C, K]; these are zeroed.

        head: the KV head of all queries, or of every query.
        """
        rows = tile_scores.rows_of(x, self.batch, self.token, head).to(dtype)
        return (rows,) if sound else tile_scores.clean(rows)[::-1]

    def add(self, total: Tensor, head: int | Tensor, rows: Tensor) -> None:
        """total [b, s, g, d] += rows [C, K, d] where `keys` takes them from."""
        _, s, g, d = total.shape
        index = (self.batch[:, None] * s + self.token) * g + _column(head)
        add_rows(total.view(-1, d), index.flatten(), rows.flatten(0, 1).to(total.dtype))


def _column(head: int | Tensor) -> int | Tensor:
    return head[:, None] if isinstance(head, Tensor) else head


def walk(
    blocks: Tensor,
    block_size: int,
    s: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_bytes: int,
) -> Iterator[Piece]:
    """Cut blocks [b, groups, t, k] over s key tokens into pieces that fit the workspace.

    key_bytes: what a query needs for each of its keys.
    """
    b, groups, t, k = blocks.shape
    if 0 in (b, groups, t, k, s):
        return
    start, position = _places(t, s, cu_seqlens_q, cu_seqlens_k, blocks.device)
    at_once = rows_at_once(min(k * block_size, s) * key_bytes, blocks.device)
    for chunk in chunks(b, groups, t, at_once):
        num_b, num_g, num_t = chunk.sizes
        first, last = (
            x[chunk.tokens].expand(num_b, num_g, num_t).flatten() for x in (start, position)
        )
        batch = torch.arange(chunk.batches.start, chunk.batches.stop, device=blocks.device)
        group = torch.arange(chunk.groups.start, chunk.groups.stop, device=blocks.device)
        own = blocks[chunk.batches, chunk.groups, chunk.tokens].long().flatten(0, 2)
        token = _tokens(own, block_size, last - first, s)
        yield Piece(
            chunk=chunk,
            batch=batch.repeat_interleave(num_g * num_t),
            group=group.repeat_interleave(num_t).repeat(num_b),
            token=first[:, None] + token.clamp(max=(last - first)[:, None]),
            hidden=token > (last - first)[:, None],
        )


def _places(t: int, s: int, cu_q: Tensor | None, cu_k: Tensor | None, device: torch.device):
    """First key token of every query's sequence, and the last that the query sees: [t] each."""
    token = torch.arange(t, device=device)
    if cu_q is None:
        return torch.zeros_like(token), token + (s - t)
    cu_q, cu_k = cu_q.long(), cu_k.long()
    owner = torch.searchsorted(cu_q[1:].contiguous(), token, right=True)
    owner = owner.clamp(max=cu_q.shape[0] - 2)
    return cu_k[owner], token + (cu_k[1:] - cu_q[1:])[owner]


def _tokens(blocks: Tensor, block_size: int, position: Tensor, s: int) -> Tensor:
    """blocks [C, k] in any order -> tokens [C, K] of the sequence, ascending, each once.

    What is not visible at `position` [C] follows, under some number after it.
    """
    nothing = s  # as a block or as a token, beyond every query
    seen = (blocks >= 0) & (blocks <= position[:, None] // block_size)
    blocks = torch.where(seen, blocks, nothing)
    ascends = (blocks[:, 1:] > blocks[:, :-1]) | (blocks[:, 1:] == nothing)
    if blocks.device.type != "cpu" or not ascends.all():
        blocks = blocks.sort(-1).values
        blocks[:, 1:].masked_fill_(blocks[:, 1:] == blocks[:, :-1], nothing)
        blocks = blocks.sort(-1).values
    most = int(position.max()) if position.device.type == "cpu" else s - 1
    blocks = blocks[:, : most // block_size + 1]
    place = torch.arange(block_size, device=blocks.device)
    return (blocks[..., None] * block_size + place).flatten(1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [C, m, n] @ b [C, n, l], or @ b [1, n, l] that all C have in common."""
    if len(b) > 1:
        return torch.bmm(a, b)
    return (a.flatten(0, 1) @ b[0]).unflatten(0, a.shape[:2])


def product_over_queries(a: Tensor, b: Tensor, keys: Tensor) -> Tensor:
    """a [C, m, K], b [C, m, d] -> what they give for keys [C, K, d], or for [1, K, d] in sum."""
    if len(keys) > 1:
        return torch.bmm(a.mT, b)
    return (a.flatten(0, 1).mT @ b.flatten(0, 1))[None]


def all_finite(x: Tensor) -> bool:
    """Whether x [b, s, g, d] is known to be finite: only a CPU is asked, it would stall others."""
    if x.device.type != "cpu":
        return False
    # A CPU sums low precision through a copy in fp32: some tokens at a time.
    at_once = rows_at_once(4 * x[:, :1].numel() or 1, x.device, wanted=16)
    sums = (part.sum(-1, dtype=accumulate_dtype(x)) for part in x.split(at_once, 1))
    return all(bool(part.isfinite().all()) for part in sums)


def hide(x: Tensor, hidden: Tensor, *spoilt: Tensor) -> Tensor:
    """x [C, m, K], in place: -inf where hidden [C, K], NaN where spoilt [C | 1, K] and seen."""
    for each in spoilt:
        x.add_(torch.where(each, math.nan, 0.0).to(x.dtype)[:, None])
    return x.masked_fill_(hidden[:, None], -math.inf)


def scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """q [C, m, d], keys [C | 1, K, d] -> scaled products [C, m, K] in fp32 or fp64."""
    return product(q, keys.mT).to(accumulate_dtype(q)).mul_(scale)


def softmax_(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores -> weights over the last axis, in place, and the logarithm of their sum.

    Where nothing is seen, weights are 0 and the logarithm is -inf.
    """
    top = x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)
    total = x.sub_(top).exp_().sum(-1, keepdim=True)
    return x.div_(torch.where(total == 0, 1, total)), top + total.log()
