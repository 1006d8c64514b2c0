"""KL(attention || index) in bounded memory, value and gradient in one pass.

    P   = mean over the group's heads of exp(X - lse)     teacher, X = q K * scale
    P'  = exp(Y - lse')                                   student, Y = q_index K_index * index_scale
    KL  = sum of P (log P - log P')
    dY  = w (P' - P) / (sum of w * groups);    dq_index = dY K_index,    dK_index = dY q_index

The loss is one number, so its backward only multiplies these gradients by another one. They are
kept in fp32 and are made only if somebody will ask for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openmsa.ops import prefixes, tiles
from openmsa.ops.workspace import accumulate_dtype, add_rows, matmul_dtype, no_autocast


def index_loss(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    blocks: Tensor | None,
    *,
    block_size: int,
    scale: float,
    index_scale: float,
    row_weights: Tensor | None = None,
    lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """q [b, t, h, d], k [b, s, g, d], q_index [b, t, g, di], k_index [b, s, di], blocks [b, 1 | g,
    t, n]; see the door."""
    wanted = torch.is_grad_enabled() and (q_index.requires_grad or k_index.requires_grad)
    tensors = (q, k, q_index, k_index, blocks, row_weights, lse, cu_seqlens_q, cu_seqlens_k)
    return _forward(*tensors, block_size, scale, index_scale, wanted)[0]


@torch.library.custom_op("openmsa::portable_index_loss", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    blocks: Tensor | None,
    row_weights: Tensor | None,
    lse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    index_scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = q.new_ones(q.shape[:2]) if row_weights is None else row_weights
    weights = weights.to(accumulate_dtype(q_index))
    loss, dq, dk = _empty(q_index, k_index, with_gradient)
    work = _Work(q, k, q_index, k_index, weights, lse, scale, index_scale, loss, dq, dk)
    for x in (loss, dq, dk):
        x.zero_()
    with no_autocast(q):
        if blocks is None:
            _over_prefixes(work, cu_seqlens_q, cu_seqlens_k)
        else:
            _over_blocks(work, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
    total = weights.sum() * q_index.shape[2]
    share = torch.where(total == 0, 0, 1 / total)
    return loss.mul_(share), dq.mul_(share * index_scale), dk.mul_(share * index_scale)


@_forward.register_fake
def _(q, k, q_index, k_index, *rest):
    return _empty(q_index, k_index, with_gradient=rest[-1])


def _empty(q_index: Tensor, k_index: Tensor, with_gradient: bool) -> tuple[Tensor, ...]:
    sums = accumulate_dtype(q_index)
    shapes = ((), q_index.shape, k_index.shape) if with_gradient else ((), (0,), (0,))
    return tuple(q_index.new_empty(shape, dtype=sums) for shape in shapes)


@dataclass(frozen=True)
class _Work:
    """One call: what goes in, and the sums that grow: loss, dq, dk, all before their common
    factor."""

    q: Tensor
    k: Tensor
    q_index: Tensor
    k_index: Tensor
    weights: Tensor
    lse: Tensor | None
    scale: float
    index_scale: float
    loss: Tensor
    dq: Tensor
    dk: Tensor

    @property
    def with_gradient(self) -> bool:
        return self.dq.dim() > 1

    @property
    def r(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    def add(self, teacher: Tensor, log_student: Tensor, weights: Tensor, dim: int) -> Tensor:
        """Add the loss over keys (along dim) and queries; return dY."""
        # Where both are 0 the logarithm is -inf, and 0 * -inf would be NaN.
        finite = log_student.clamp(min=torch.finfo(log_student.dtype).min)
        kl = (torch.xlogy(teacher, teacher) - teacher * finite).sum(dim, keepdim=True)
        self.loss.add_((kl * weights).sum())
        return log_student.exp().sub_(teacher).mul_(weights)


def _over_prefixes(work: _Work, cu_seqlens_q, cu_seqlens_k):
    """Support: every visible key."""
    g, factor, sums = work.k.shape[2], matmul_dtype(work.q), work.loss.dtype
    poison, k = prefixes.clean(work.q.shape[1], work.k)
    poison_index, k_index = prefixes.clean(work.q.shape[1], work.k_index[:, :, None])
    # Scores of the r heads in two precisions, then five tensors of their mean's size.
    each = 12 + -(-24 // work.r)
    for piece in prefixes.pieces(work.q, k, cu_seqlens_q, cu_seqlens_k, each):
        queries = prefixes.queries_of(work.q, piece, g, factor)
        x = prefixes.scores(queries, prefixes.keys_of(k, piece, factor), piece, work.scale, poison)
        teacher = x.softmax(-1) if work.lse is None else _exp_minus(x, work.lse, piece, g)
        teacher = teacher.to(sums).mean(1).flatten(0, 1)

        queries = prefixes.queries_of(work.q_index, piece, g, sums).flatten(0, 1)
        keys = prefixes.keys_of(k_index, replace(piece, heads=slice(0, 1)), sums)
        y = prefixes.scores(queries[None], keys, piece, work.index_scale, poison_index)
        weights = work.weights[piece.batch, piece.queries].repeat(teacher.shape[0] // y.shape[2])
        dy = work.add(teacher, y.flatten(0, 2).log_softmax(-1), weights[:, None], 1)
        if work.with_gradient:
            dq = (dy @ keys[0]).unflatten(0, (-1, y.shape[2]))
            prefixes.put_queries(work.dq, piece, g, dq)
            work.dk[piece.batch, piece.keys].add_(dy.mT @ queries)


def _exp_minus(x, lse, piece, g):
    lse = prefixes.queries_of(lse[..., None], piece, g, x.dtype)
    return x.sub_(lse.unflatten(1, x.shape[1:3])).exp_()


def _over_blocks(work: _Work, blocks, block_size, cu_seqlens_q, cu_seqlens_k):
    """Support: the visible keys of the selected blocks."""
    b, t, _, d = work.q.shape
    s, g = work.k.shape[1:3]
    di = work.q_index.shape[3]
    rows = tiles.rows_of((b, t, s), block_size, cu_seqlens_q, cu_seqlens_k, work.q.device)
    dk = work.loss.new_zeros(rows.count if work.with_gradient else 0, block_size * di)
    each = 4 * (work.r * (2 * block_size + 2 * d) + 6 * block_size + 3 * di)
    for chunk, tile in tiles.walk(blocks.expand(-1, g, -1, -1), rows, work.r, each):
        teacher = _teacher(work, chunk, tile)
        log_student, queries, keys = _log_student(work, chunk, tile)
        weights = chunk.of(work.weights[:, :, None].expand(b, t, g)).transpose(1, 2)
        weights = torch.cat([weights.flatten(), weights.new_zeros(1)])[tile.query][:, None]
        dy = work.add(teacher, log_student, weights, 1)
        if work.with_gradient:
            dq = torch.bmm(dy.mT, keys).flatten(0, 1)[tile.place].sum(1)
            chunk.of(work.dq).copy_(tiles.by_query(dq, chunk))
            add_rows(dk, tile.row, torch.bmm(dy, queries).flatten(1))
    if work.with_gradient:
        work.dk.copy_(tiles.by_token(dk, rows, work.k_index[:, :, None])[:, :, 0])


def _teacher(work: _Work, chunk, tile):
    """Mean of the heads' attention weights, [T, w, width]."""
    r, width = work.r, tile.query.shape[1]
    factor, sums = matmul_dtype(work.q), accumulate_dtype(work.q)
    at = tiles.heads_at(tile.query, r)
    q = tiles.with_filler(chunk.of(work.q.unflatten(2, (-1, r))), factor)
    q = q.index_select(0, at).view(len(tile.row), r * width, -1)
    spoilt, k = tiles.clean(tiles.keys_of(work.k, tile, work.k.shape[2], factor))
    x = tiles.scores(q, k, tile, work.scale, spoilt)
    if work.lse is None:
        lse = _log_sum_exp(x, tiles.results_at(tile.place, r, width))
        lse = torch.cat([lse.flatten(), lse.new_full((r,), math.inf)])
    else:
        lse = chunk.of(work.lse.unflatten(2, (-1, r))).to(sums)
        lse = tiles.with_filler(lse[..., None], sums, math.inf)[:, 0]
    x.sub_(lse[at].view(len(tile.row), 1, -1)).exp_()
    return x.unflatten(2, (r, width)).mean(2).to(work.loss.dtype)


def _log_student(work: _Work, chunk, tile):
    """Logarithm of the student's weights [T, w, width], with the index queries and keys of the
    tiles."""
    width, sums = tile.query.shape[1], work.loss.dtype
    q = tiles.with_filler(chunk.of(work.q_index)[:, :, :, None], sums)
    q = q.index_select(0, tile.query.flatten()).view(len(tile.row), width, -1)
    keys = tiles.keys_of(work.k_index[:, :, None], tile, work.q_index.shape[2], sums)
    spoilt, keys = tiles.clean(keys)
    y = tiles.scores(q, keys, tile, work.index_scale, spoilt)
    lse = _log_sum_exp(y, tile.place[..., None])
    lse = torch.cat([lse.flatten(), lse.new_full((1,), math.inf)])
    return y.sub_(lse[tile.query][:, None]), q, keys


def _log_sum_exp(x: Tensor, at: Tensor) -> Tensor:
    """x [T, w, places] -> [C, r], over all places of a query."""
    top = x.amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)
    return tiles.combine(top, (x - top).exp_().sum(1), at)[0]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:], inputs[2], inputs[3])


def _differentiate(ctx, dloss, _, __):
    dq, dk, q_index, k_index = ctx.saved_tensors
    nothing = [None] * 9
    return None, None, (dq * dloss).to(q_index.dtype), (dk * dloss).to(k_index.dtype), *nothing


_forward.register_autograd(_differentiate, setup_context=_save)
