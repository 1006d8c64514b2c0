"""Attention over selected blocks in bounded memory, in tiles of a block and queries that chose it.

Forward, per tile and head (MSA eq. 8):
    X = K q * scale;  m = max X;  l = sum exp(X - m);  o = exp(X - m) V
then per query, over its k blocks:
    lse = log sum l exp(m);  out = sum o exp(m - lse)
Backward, from lse and delta = dout . out:
    P = exp(X - lse);  dX = P (V dout - delta)
    dV = P dout;  dK = dX q * scale;  dq = dX K * scale
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from openmsa.ops import tiles
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
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, dv], blocks [b, 1 | g | h, t, n]; see the
    door."""
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
    with no_autocast(q):
        work = _Work(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
        for chunk, tile in work.tiles():
            part, stats = _attend(work, chunk, tile, scale)
            chunk.of(work.heads(out)).copy_(part)
            chunk.of(work.heads(lse)).copy_(stats)
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
        # Per pair and head: scores, their gradient and both as factors; rows of q, dq, out, dout.
        each = 4 * self.r * (3 * self.rows.block_size + 3 * self.d + 3 * self.dv)
        return tiles.walk(self.blocks, self.rows, self.r, each)

    def heads(self, x: Tensor) -> Tensor:
        """[b, t, h, ...] -> [b, t, groups, r, ...], a view."""
        return x.unflatten(2, (self.groups, self.r))

    def scores(self, chunk: tiles.Chunk, tile: tiles.Tiles, scale: float):
        """X [T, w, r * width], and q, k, v of the tiles."""
        q = tiles.with_filler(chunk.of(self.heads(self.q)), self.factor)
        q = q.index_select(0, tiles.heads_at(tile.query, self.r)).view(len(tile.row), -1, self.d)
        k = tiles.keys_of(self.k, tile, self.groups, self.factor)
        v = tiles.keys_of(self.v, tile, self.groups, self.factor)
        spoilt, k, v = tiles.clean(k, v)
        return tiles.scores(q, k, tile, scale, spoilt).to(self.sum), q, k, v


def _attend(work: _Work, chunk, tile, scale):
    x, _, _, v = work.scores(chunk, tile, scale)
    # A place that sees no key has a maximum of -inf, and -inf - -inf would be NaN.
    top = x.amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)
    total = x.sub_(top).exp_().sum(1)
    out = torch.bmm(x.mT.to(work.factor), v).view(-1, work.dv)

    at = tiles.results_at(tile.place, work.r, tile.query.shape[1])
    lse, weight = tiles.combine(top, total, at)
    out = out.index_select(0, at.flatten()).view(*at.shape, -1).to(work.sum)
    return tiles.by_query((out * weight[..., None]).sum(1), chunk), tiles.by_query(lse, chunk)


@torch.library.custom_op("openmsa::portable_sparse_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(q):
        work = _Work(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        rows = work.kv_heads * work.rows.count
        dk = k.new_zeros(rows, block_size * work.d, dtype=work.sum)
        dv = v.new_zeros(rows, block_size * work.dv, dtype=work.sum)
        for chunk, tile in work.tiles():
            part, dk_part, dv_part = _chunk_gradients(work, chunk, tile, scale, dout, out, lse)
            chunk.of(work.heads(dq)).copy_(part)
            row = tile.group * work.kv_heads // work.groups * work.rows.count + tile.row
            add_rows(dk, row, dk_part)
            add_rows(dv, row, dv_part)
        return dq, tiles.by_token(dk, work.rows, k), tiles.by_token(dv, work.rows, v)


@_backward.register_fake
def _(dout, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _chunk_gradients(work: _Work, chunk, tile, scale, dout, out, lse):
    x, q, k, v = work.scores(chunk, tile, scale)
    at, like_q = tiles.heads_at(tile.query, work.r), (len(tile.row), q.shape[1], -1)
    dout, out, lse = (chunk.of(work.heads(y)) for y in (dout, out, lse))
    delta = (dout.to(work.sum) * out.to(work.sum)).sum(-1, keepdim=True)
    dout = tiles.with_filler(dout, work.factor).index_select(0, at).view(like_q)
    delta = tiles.with_filler(delta, work.sum)[at].view(like_q).mT
    # The filler's lse is +inf, so that its weights are 0.
    lse = tiles.with_filler(lse[..., None], work.sum, math.inf)[at].view(like_q).mT

    p = x.sub_(lse).exp_()
    dv = torch.bmm(p.to(work.factor), dout)
    dx = torch.bmm(v, dout.mT).to(work.sum).sub_(delta).mul_(p).mul_(scale).to(work.factor)
    dk = torch.bmm(dx, q)
    dq = torch.bmm(dx.mT, k).view(-1, work.d)
    place = tiles.results_at(tile.place, work.r, tile.query.shape[1])
    dq = dq.index_select(0, place.flatten()).view(*place.shape, work.d).sum(1, dtype=work.sum)
    return tiles.by_query(dq, chunk), dk.flatten(1).to(work.sum), dv.flatten(1).to(work.sum)


def _save(ctx, inputs, output):
    q, k, v, blocks, *numbers, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(q, k, v, blocks, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.numbers = numbers


def _differentiate(ctx, dout, _):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dq, dk, dv = _backward(dout, *tensors, *ctx.numbers, cu_seqlens_q, cu_seqlens_k)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
