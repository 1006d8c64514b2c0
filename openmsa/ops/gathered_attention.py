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
        self.q, self.k, self.v, self.blocks = q, k, v, blocks
        self.groups = max(blocks.shape[1], k.shape[2])
        self.r = q.shape[2] // self.groups
        self.turns = self.groups // blocks.shape[1]  # groups that share a choice
        self.cut = block_size, k.shape[1], cu_seqlens_q, cu_seqlens_k
        self.sum, self.factor = accumulate_dtype(q), matmul_dtype(q)
        # Looking at every key once is less work than at every copy, if it is copied often.
        often = blocks.shape[2] * blocks.shape[3] * block_size > k.shape[1]
        self.sound = often and gathers.all_finite(k) and gathers.all_finite(v)

    def pieces(self, stages: int) -> Iterator[tuple[gathers.Piece, int]]:
        """Pieces of queries, and the turn of the groups that share their choice.

        stages: how often a key and a value, and the scores of the r heads, exist at once.
        """
        wide = self.q.shape[3] + self.v.shape[3]
        for piece in gathers.walk(self.blocks, *self.cut, 4 * stages * (wide + self.r)):
            for turn in range(self.turns):
                yield piece, turn

    def heads(self, x: Tensor, turn: int) -> Tensor:
        """[b, t, h, ...] -> [b, t, groups of this turn, r, ...], a view."""
        return x.unflatten(2, (self.groups, self.r))[:, :, turn :: self.turns]

    def kv_head(self, piece: gathers.Piece, turn: int) -> Tensor:
        """The KV head of every query of the piece, [C]."""
        return (piece.group * self.turns + turn) * self.k.shape[2] // self.groups

    def weights(self, piece: gathers.Piece, turn: int, scale: float):
        """P [C, r, K] and lse [C, r, 1]; then q, k, v of the piece."""
        head = self.kv_head(piece, turn)
        q = piece.chunk.of(self.heads(self.q, turn)).to(self.factor)
        k, *spoilt_k = piece.keys(self.k, head, self.factor, self.sound)
        v, *spoilt_v = piece.keys(self.v, head, self.factor, self.sound)
        x = gathers.hide(gathers.scores(q, k, scale), piece.hidden, *spoilt_k, *spoilt_v)
        return *gathers.softmax_(x), q, k, v


def attend(work: Work, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fill out [b, t, h, dv] and lse [b, t, h]."""
    for piece, turn in work.pieces(stages=3):
        p, total, _, _, v = work.weights(piece, turn, scale)
        piece.chunk.put(work.heads(out, turn), torch.bmm(p.to(work.factor), v))
        piece.chunk.put(work.heads(lse[..., None], turn), total)


def gradients(work: Work, scale: float, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv for dout [b, t, h, dv]."""
    dq = torch.zeros_like(work.q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=work.sum) for x in (work.k, work.v))
    for piece, turn in work.pieces(stages=5):
        p, _, q, k, v = work.weights(piece, turn, scale)
        head = work.kv_head(piece, turn)
        here = piece.chunk.of(work.heads(dout, turn)).to(work.factor)
        piece.add(dv, head, torch.bmm(p.to(work.factor).mT, here))
        # sum P dP equals dout . out, but that form rounds differently from dP.
        dx = torch.bmm(here, v.mT).to(work.sum).mul_(p)
        dx.sub_(p.mul_(dx.sum(-1, keepdim=True)))
        dx = dx.mul_(scale).to(work.factor)
        piece.add(dk, head, torch.bmm(dx.mT, q))
        piece.chunk.put(work.heads(dq, turn), torch.bmm(dx, k))
    return dq, dk.to(work.k.dtype), dv.to(work.v.dtype)
