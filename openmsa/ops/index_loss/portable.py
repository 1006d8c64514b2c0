"""KL(attention || index) in bounded memory, value and gradient in one pass.

    P   = mean over the group's heads of exp(X - lse)     teacher, X = q K * scale
    P'  = exp(Y - lse')                                   student, Y = q_index K_index * index_scale
    KL  = sum of P (log P - log P')
    dY  = w (P' - P) / (sum of w * groups);    dq_index = dY K_index,    dK_index = dY q_index

The loss is one number, so its backward only multiplies these gradients by another one. They are
kept in fp32 and are made only if somebody will ask for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openmsa.ops import prefixes, tile_scores, tiles
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
    """blocks [b, 1 | g, t, k] or None for the whole prefix; the rest as at the door."""
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
    """One call: what goes in, and the sums loss, dq and dk, before their common factor."""

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
        # Where a weight is 0 its logarithm is -inf, and 0 * -inf would be NaN.
        number = torch.finfo(teacher.dtype)
        gap = teacher.clamp(min=number.tiny).log_().sub_(log_student.clamp(min=number.min))
        kl = gap.mul_(teacher).sum(dim, keepdim=True)
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
        teacher = x.softmax(-1).mean(1).flatten(0, 1).to(sums)

        queries = prefixes.queries_of(work.q_index, piece, g, sums).flatten(0, 1)
        keys = prefixes.keys_of(k_index, replace(piece, heads=slice(0, 1)), sums)
        y = prefixes.scores(queries[None], keys, piece, work.index_scale, poison_index)
        weights = work.weights[piece.batch, piece.queries].repeat(teacher.shape[0] // y.shape[2])
        dy = work.add(teacher, y.flatten(0, 2).log_softmax(-1), weights[:, None], 1)
        if work.with_gradient:
            dq = (dy @ keys[0]).unflatten(0, (-1, y.shape[2]))
            prefixes.put_queries(work.dq, piece, g, dq)
            work.dk[piece.batch, piece.keys].add_(dy.mT @ queries)


def _over_blocks(work: _Work, blocks, block_size, cu_seqlens_q, cu_seqlens_k):
    """Support: the visible keys of the selected blocks."""
    b, t, _, d = work.q.shape
    s, g = work.k.shape[1:3]
    di = work.q_index.shape[3]
    rows = tiles.rows_of((b, t, s), block_size, cu_seqlens_q, cu_seqlens_k, work.q.device)
    dk = work.loss.new_zeros(rows.count if work.with_gradient else 0, block_size * di)
    weights = work.weights[:, :, None, None, None].expand(b, t, g, 1, 1)
    # Per pair: scores of r heads and as given, q; then the student's in six stages, q_index, dq.
    pair = 4 * (work.r * (2 * block_size + 2 * d + 4) + 6 * block_size + 3 * di)
    tile_bytes = 4 * block_size * (d + 3 * di)
    for chunk, tile in tiles.walk(blocks.expand(-1, g, -1, -1), rows, work.r, pair, tile_bytes):
        teacher = _teacher(work, chunk, tile)
        one_head = tile.one_head()
        log_student, queries, keys = _log_student(work, chunk, one_head)
        weight = one_head.spread(chunk.of(weights)).mT
        dy = work.add(teacher, log_student, weight, 1)
        if work.with_gradient:
            dq = one_head.collect(torch.bmm(dy.mT, keys)).sum(1)
            chunk.put(work.dq[:, :, :, None], dq)
            add_rows(dk, tile.row, torch.bmm(dy, queries).flatten(1))
    if work.with_gradient:
        work.dk.copy_(tile_scores.by_token(dk, rows, work.k_index[:, :, None])[:, :, 0])


def _teacher(work: _Work, chunk, tile):
    """Mean of the heads' attention weights, [T, w, width]."""
    factor, sums = matmul_dtype(work.q), accumulate_dtype(work.q)
    heads = (-1, work.r)
    q = tile.spread(chunk.of(work.q.unflatten(2, heads)).to(factor))
    spoilt, k = tile_scores.clean(tile_scores.keys_of(work.k, tile, work.k.shape[2], factor))
    x = tile_scores.scores(q, k, tile, work.scale, spoilt)
    lse = None
    if work.lse is not None:
        lse = chunk.of(work.lse[..., None].unflatten(2, heads)).to(sums)
    tile_scores.softmax_(x, tile, lse)
    return x.unflatten(2, (work.r, -1)).mean(2).to(work.loss.dtype)


def _log_student(work: _Work, chunk, tile):
    """Logarithm of the student's weights [T, w, width], with the index queries and keys."""
    sums = work.loss.dtype
    q = tile.spread(chunk.of(work.q_index[:, :, :, None]).to(sums))
    keys = tile_scores.keys_of(work.k_index[:, :, None], tile, work.q_index.shape[2], sums)
    spoilt, keys = tile_scores.clean(keys)
    y = tile_scores.scores(q, keys, tile, work.index_scale, spoilt)
    shift = tile.collect(tile_scores.tops(y)).amax(1)
    total = tile_scores.exp_(y.clone(), tile, shift)
    return y.sub_(tile.spread(shift + total.log()).mT), q, keys


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:], inputs[2], inputs[3])


def _differentiate(ctx, dloss, _, __):
    dq, dk, q_index, k_index = ctx.saved_tensors
    nothing = [None] * 9
    return None, None, (dq * dloss).to(q_index.dtype), (dk * dloss).to(k_index.dtype), *nothing


_forward.register_autograd(_differentiate, setup_context=_save)
