"""Attention over short blocks in bounded memory: every query with its own keys beside it.

Forward, per query and group, over the K tokens of its blocks (MSA eq. 8; DSA with blocks of 1):
    P = softmax(q K * scale);  out = P V
Backward:
    dP = dout V;  dX = P (dP - sum P dP)
    dV = P dout;  dK = dX q * scale;  dq = dX K * scale
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from openmsa.ops import gathers
from openmsa.ops.workspace import accumulate_dtype, matmul_dtype


def serves(q: Tensor, k: Tensor, blocks: Tensor, block_size: int) -> bool:
    """Whether copying a block for a query is less than copying the query's heads for a block."""
    return block_size <= q.shape[2] // max(blocks.shape[1], k.shape[2])


class Work:
    """One call: the sizes, and how the queries are cut up."""

    def __init__(self, q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k):
        self.q, self.k, self.v = q, k, v
        self.kv_heads = k.shape[2]
        self.groups = max(blocks.shape[1], self.kv_heads)
        self.r = q.shape[2] // self.groups
        self.blocks = blocks.expand(-1, self.groups, -1, -1)
        self.cut = block_size, k.shape[1], cu_seqlens_q, cu_seqlens_k
        self.sum, self.factor = accumulate_dtype(q), matmul_dtype(q)

    def pieces(self, stages: int) -> Iterator[gathers.Piece]:
        """stages: how often a key and a value, and the scores of the r heads, exist at once."""
        wide = self.q.shape[3] + self.v.shape[3]
        return gathers.walk(self.blocks, *self.cut, 4 * stages * (wide + self.r))

    def heads(self, x: Tensor) -> Tensor:
        """[b, t, h, ...] -> [b, t, groups, r, ...], a view."""
        return x.unflatten(2, (self.groups, self.r))

    def kv_head(self, piece: gathers.Piece) -> Tensor:
        """The KV head of every query of the piece, [C]."""
        return piece.group * self.kv_heads // self.groups

    def weights(self, piece: gathers.Piece, scale: float):
        """P [C, r, K] and lse [C, r, 1]; then q, k, v of the piece."""
        head = self.kv_head(piece)
        q = piece.chunk.of(self.heads(self.q)).to(self.factor)
        spoilt_k, k = piece.keys(self.k, head, self.factor)
        spoilt_v, v = piece.keys(self.v, head, self.factor)
        x = gathers.hide(gathers.scores(q, k, scale), piece.hidden, spoilt_k | spoilt_v)
        return *gathers.softmax_(x), q, k, v


def attend(work: Work, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fill out [b, t, h, dv] and lse [b, t, h]."""
    for piece in work.pieces(stages=3):
        p, total, _, _, v = work.weights(piece, scale)
        piece.chunk.put(work.heads(out), torch.bmm(p.to(work.factor), v))
        piece.chunk.put(work.heads(lse[..., None]), total)


def gradients(work: Work, scale: float, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv for dout [b, t, h, dv]."""
    dq = torch.zeros_like(work.q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=work.sum) for x in (work.k, work.v))
    for piece in work.pieces(stages=5):
        p, _, q, k, v = work.weights(piece, scale)
        head = work.kv_head(piece)
        dout_here = piece.chunk.of(work.heads(dout)).to(work.factor)
        piece.add(dv, head, torch.bmm(p.to(work.factor).mT, dout_here))
        # sum P dP equals dout . out, but that form rounds differently from dP.
        dx = torch.bmm(dout_here, v.mT).to(work.sum).mul_(p)
        dx.sub_(p.mul_(dx.sum(-1, keepdim=True)))
        dx = dx.mul_(scale).to(work.factor)
        piece.add(dk, head, torch.bmm(dx.mT, q))
        piece.chunk.put(work.heads(dq), torch.bmm(dx, k))
    return dq, dk.to(work.k.dtype), dv.to(work.v.dtype)
