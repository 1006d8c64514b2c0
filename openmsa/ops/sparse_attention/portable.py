"""Attention over selected blocks in bounded memory, in tiles of a block and queries that chose it.

Blocks with no more tokens than a group has heads go another way: see gathered_attention.

Forward, per tile and head (MSA eq. 8):
    X = K q * scale;  m = max X;  l = sum exp(X - m);  o = exp(X - m) V
then per query, over its k blocks:
    lse = log sum l exp(m);  out = sum o exp(m - lse)
Backward:
    P = exp(X - lse);  dP = V dout;  dX = P (dP - sum P dP)
    dV = P dout;  dK = dX q * scale;  dq = dX K * scale
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from openmsa.ops import gathered_attention as gathered
from openmsa.ops import tile_scores, tiles
from openmsa.ops.workspace import (
    accumulate_dtype,
    add_rows,
    matmul_dtype,
    no_autocast,
)


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
    """blocks [b, 1 | g | h, t, k], in any order; the rest as at the door."""
    return _forward(q, k, v, blocks, block_size, scale, cu_seqlens_q, cu_seqlens_k)


@torch.library.custom_op("openmsa::portable_sparse_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = _empty(q, v)
    out.zero_()
    lse.fill_(-math.inf)
    inputs = (q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
    with no_autocast(q):
        if gathered.serves(q, k, blocks, block_size):
            gathered.attend(gathered.Work(*inputs), scale, out, lse)
            return out, lse
        work = _Work(*inputs)
        for chunk, tile in work.tiles():
            part, stats = _attend(work, chunk, tile, scale)
            chunk.put(work.heads(out), part)
            chunk.put(work.heads(lse[..., None]), stats)
    return out, lse


@_forward.register_fake
def _(q, k, v, blocks, block_size, scale, cu_seqlens_q, cu_seqlens_k):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q))


class _Work:
    """One call: the sizes, where the blocks lie, and how the queries are cut up."""

    def __init__(self, q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k):
        self.b, self.t, self.h, self.d = q.shape
        self.s, self.kv_heads, self.dv = v.shape[1:]
        self.groups = max(blocks.shape[1], self.kv_heads)
        self.r = self.h // self.groups
        self.q, self.k, self.v = q, k, v
        self.blocks = blocks.expand(-1, self.groups, -1, -1)
        self.sum, self.factor = accumulate_dtype(q), matmul_dtype(q)
        shape = (self.b, self.t, self.s)
        self.rows = tiles.rows_of(shape, block_size, cu_seqlens_q, cu_seqlens_k, q.device)

    def tiles(self) -> Iterator[tuple[tiles.Chunk, tiles.Tiles]]:
        w, wide = self.rows.block_size, self.d + self.dv
        # Per pair and head: scores, their gradient, both as factors, q, dq, out, dout and a place.
        pair = 4 * self.r * (3 * w + 2 * wide + 4)
        # Per tile: keys and values, then the gradient of one of them as it is and summed.
        return tiles.walk(self.blocks, self.rows, self.r, pair, 4 * w * 2 * wide)

    def heads(self, x: Tensor) -> Tensor:
        """[b, t, h, ...] -> [b, t, groups, r, ...], a view."""
        return x.unflatten(2, (self.groups, self.r))

    def scores(self, chunk: tiles.Chunk, tile: tiles.Tiles, scale: float):
        """X [T, w, r * width], and q, k, v of the tiles."""
        q = tile.spread(chunk.of(self.heads(self.q)).to(self.factor))
        k = tile_scores.keys_of(self.k, tile, self.groups, self.factor)
        v = tile_scores.keys_of(self.v, tile, self.groups, self.factor)
        spoilt, k, v = tile_scores.clean(k, v)
        return tile_scores.scores(q, k, tile, scale, spoilt), q, k, v


def _attend(work: _Work, chunk, tile, scale):
    """The chunk's out [C, r, dv] and lse [C, r, 1]."""
    x, _, _, v = work.scores(chunk, tile, scale)
    top = tile_scores.tops(x)
    total = tile.collect(x.sub_(top.mT).exp_().sum(1)[..., None])
    out = tile.collect(torch.bmm(x.mT.to(work.factor), v)).to(work.sum)
    top = tile.collect(top)
    best = top.amax(1, keepdim=True)
    weight = top.sub_(best).exp_()
    total = (total * weight).sum(1)
    out = (out * weight).sum(1) / torch.where(total == 0, 1, total)
    return out, best[:, 0] + total.log()


@torch.library.custom_op("openmsa::portable_sparse_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
    with no_autocast(q):
        if gathered.serves(q, k, blocks, block_size):
            return gathered.gradients(gathered.Work(*inputs), scale, dout)
        work = _Work(*inputs)
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        rows = work.kv_heads * work.rows.count
        dk = k.new_zeros(rows, block_size * work.d, dtype=work.sum)
        dv = v.new_zeros(rows, block_size * work.dv, dtype=work.sum)
        for chunk, tile in work.tiles():
            _add_gradients(work, chunk, tile, scale, dout, lse, dq, dk, dv)
        return dq, tile_scores.by_token(dk, work.rows, k), tile_scores.by_token(dv, work.rows, v)


@_backward.register_fake
def _(dout, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _add_gradients(work: _Work, chunk, tile, scale, dout, lse, dq, dk, dv):
    """Write the chunk's dq; add to dk and dv, [g * rows, w * d], what its tiles contribute."""
    x, q, k, v = work.scores(chunk, tile, scale)
    dout = tile.spread(chunk.of(work.heads(dout)).to(work.factor))
    row = tile.group * work.kv_heads // work.groups * work.rows.count + tile.row
    p = tile_scores.softmax_(x, tile, chunk.of(work.heads(lse[..., None])))
    add_rows(dv, row, torch.bmm(p.to(work.factor), dout).flatten(1).to(work.sum))
    # sum P dP equals dout . out, but that form rounds differently from dP and leaves a difference
    # where a softmax over one key has none.
    dx = torch.bmm(v, dout.mT).to(work.sum).mul_(p)
    dx.sub_(p.mul_(tile.spread(tile_scores.sum_of(dx, tile)).mT))
    dx = dx.mul_(scale).to(work.factor)
    add_rows(dk, row, torch.bmm(dx, q).flatten(1).to(work.sum))
    parts = tile.collect(torch.bmm(dx.mT, k))
    chunk.put(work.heads(dq), parts.sum(1, dtype=work.sum))


def _save(ctx, inputs, output):
    q, k, v, blocks, *numbers, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(q, k, v, blocks, output[1], cu_seqlens_q, cu_seqlens_k)
    ctx.numbers = numbers


def _differentiate(ctx, dout, _):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dq, dk, dv = _backward(dout, *tensors, *ctx.numbers, cu_seqlens_q, cu_seqlens_k)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
