"""KL(attention || lightning indexer) in bounded memory, value and gradient in one pass.

    P    = mean over all heads of softmax(X)                  teacher, X = q K * scale
    Y    = index_scale * sum over j of w_j A_j                student, A_j = relu(q_index_j K_index)
    KL   = sum of P (log P - log P'),   P' = softmax(Y)
    dY   = row_weight (P' - P) / (sum of row_weight) * index_scale
    dw_j = dY A_j;   dA_j = w_j dY where A_j > 0;   dq_index_j = dA_j K_index;   dK_index = dA_j q_j

A piece is some queries with the keys of each (gathers) or with one prefix for all of them. Heads
are taken as many at a time as fit. The loss is one number, so its backward only multiplies these
gradients by another one; they are kept in fp32 and made only if somebody will ask for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.ops import gathers, prefixes, tile_scores, workspace
from openmsa.ops.workspace import accumulate_dtype, matmul_dtype, no_autocast


def token_index_loss(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    blocks: Tensor | None,
    *,
    block_size: int,
    scale: float,
    index_scale: float,
    row_weights: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """blocks [b, 1, t, k] or None for the whole prefix; the rest as at the door."""
    taught = q_index, k_index, head_weights
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in taught)
    tensors = (q, k, *taught, blocks, row_weights, cu_seqlens_q, cu_seqlens_k)
    return _forward(*tensors, block_size, scale, index_scale, wanted)[0]


@torch.library.custom_op("openmsa::portable_token_index_loss", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    blocks: Tensor | None,
    row_weights: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    index_scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = accumulate_dtype(q_index)
    rows = torch.ones(q.shape[:2], device=q.device) if row_weights is None else row_weights
    rows = rows.to(sums)
    results = _empty(q_index, k_index, head_weights, with_gradient)
    for x in results:
        x.zero_()
    finite = gathers.all_finite(k), gathers.all_finite(k_index[:, :, None])
    work = _Work(q, k, q_index, k_index, head_weights, scale, index_scale, *results, *finite)
    where = cu_seqlens_q, cu_seqlens_k
    pieces = work.prefixes(*where)
    if blocks is not None:
        pieces = work.gathers(blocks, block_size, *where)
    with no_autocast(q):
        for piece in pieces:
            _add(work, piece, piece.queries(rows[..., None]))
    total = rows.sum()
    share = torch.where(total == 0, 0, 1 / total)
    loss, *gradients = results
    return loss.mul_(share), *(x.mul_(share * index_scale) for x in gradients)


@_forward.register_fake
def _(q, k, q_index, k_index, head_weights, *rest):
    return _empty(q_index, k_index, head_weights, with_gradient=rest[-1])


def _empty(q_index, k_index, head_weights, with_gradient: bool) -> tuple[Tensor, ...]:
    """The loss, and gradients in its dtype or nothing."""
    sums = accumulate_dtype(q_index)
    shapes = [x.shape if with_gradient else (0,) for x in (q_index, k_index, head_weights)]
    return tuple(q_index.new_empty(shape, dtype=sums) for shape in ((), *shapes))


@dataclass(frozen=True)
class _Prefix:
    """Some queries of one sequence, and every key that the last of them sees."""

    piece: prefixes.Piece
    hidden: Tensor  # [C, K] keys after a query

    def queries(self, x: Tensor) -> Tensor:
        """x [b, t, m, d] -> [C, m, d]"""
        return x[self.piece.batch, self.piece.queries]

    def put(self, x: Tensor, values: Tensor) -> None:
        self.queries(x).copy_(values)

    def keys(self, x: Tensor, head: int, dtype: torch.dtype, sound: bool) -> tuple[Tensor, ...]:
        """x [b, s, g, d] -> tokens [1, K, d] and, unless x is sound, which are not finite [1, K]"""
        rows = x[self.piece.batch, self.piece.keys, head][None].to(dtype)
        return (rows,) if sound else tile_scores.clean(rows)[::-1]

    def add(self, total: Tensor, head: int, rows: Tensor) -> None:
        """total [b, s, g, d] += rows [1, K, d] where `keys` takes them from."""
        total[self.piece.batch, self.piece.keys, head].add_(rows[0])


@dataclass(frozen=True)
class _Work:
    """One call: what goes in, and the sums loss, dq, dk and dw before their common factor."""

    q: Tensor
    k: Tensor
    q_index: Tensor
    k_index: Tensor
    head_weights: Tensor
    scale: float
    index_scale: float
    loss: Tensor
    dq: Tensor
    dk: Tensor
    dw: Tensor
    sound: bool  # all of k is finite
    sound_index: bool

    @property
    def with_gradient(self) -> bool:
        return self.dq.dim() > 1

    @property
    def heads(self) -> int:
        """The most that are multiplied with one set of keys."""
        return max(self.q_index.shape[2], self.q.shape[2] // self.k.shape[2])

    def gathers(self, blocks: Tensor, block_size: int, *where) -> Iterator[gathers.Piece]:
        # Keys twice, their gradient; the scores of every head in three stages.
        each = 4 * (3 * max(self.k.shape[3], self.k_index.shape[2]) + 3 * self.heads + 8)
        return gathers.walk(blocks, block_size, self.k.shape[1], *where, each)

    def prefixes(self, *where) -> Iterator[_Prefix]:
        most = self.q_index if self.heads == self.q_index.shape[2] else self.q[:, :, : self.heads]
        # Scores in three stages; what there is once for all heads hardly counts.
        for piece in prefixes.pieces(most, self.k_index[:, :, None], *where, 16):
            token = torch.arange(piece.keys.stop - piece.keys.start, device=self.q.device)
            yield _Prefix(piece, token > token[piece.seen :, None])

    def some_heads(self, count: int, queries: int, keys: int) -> Iterator[slice]:
        """Slices of `count` heads whose scores fit the workspace."""
        at_once = max(1, workspace.WORKSPACE_BYTES // (16 * queries * keys))
        for start in range(0, count, at_once):
            yield slice(start, min(count, start + at_once))


def _add(work: _Work, piece, row_weights: Tensor) -> None:
    """Add a piece to loss, dq, dk and dw; row_weights [C, 1]."""
    teacher = _teacher(work, piece).to(work.loss.dtype)
    index_keys = work.k_index[:, :, None]
    keys, *spoilt = piece.keys(index_keys, 0, work.loss.dtype, work.sound_index)
    q = piece.queries(work.q_index).to(keys.dtype)
    w = piece.queries(work.head_weights[..., None]).to(keys.dtype)
    y = torch.zeros_like(teacher)
    slices = list(work.some_heads(q.shape[1], *teacher.shape))
    for some in slices:
        heads = gathers.scores(q[:, some], keys, 1.0).relu_()
        y.add_((w[:, some].mT @ heads)[:, 0])
    y = gathers.hide(y.mul_(work.index_scale)[:, None], piece.hidden, *spoilt)[:, 0]

    # Where a weight is 0 its logarithm is -inf, and 0 * -inf would be NaN.
    number = torch.finfo(teacher.dtype)
    log_student = y.log_softmax(-1).clamp_(min=number.min)
    gap = teacher.clamp(min=number.tiny).log_().sub_(log_student)
    seen = ~piece.hidden.all(-1, keepdim=True)  # without a key there is nothing to learn
    kl = gap.mul_(teacher).sum(-1, keepdim=True)
    work.loss.add_((torch.where(seen, kl, 0) * row_weights).sum())
    if not work.with_gradient:
        return
    dy = log_student.exp_().sub_(teacher).mul_(row_weights).masked_fill_(piece.hidden, 0)
    dq, dw = torch.empty_like(q), torch.empty_like(w)
    for some in slices:
        if len(slices) > 1:
            heads = gathers.scores(q[:, some], keys, 1.0).relu_()
        dw[:, some] = heads @ dy[..., None]
        da = (w[:, some] * dy[:, None]).masked_fill_(heads <= 0, 0)
        dq[:, some] = gathers.product(da, keys)
        dk = gathers.product_over_queries(da, q[:, some], keys)
        piece.add(work.dk[:, :, None], 0, dk)
    piece.put(work.dq, dq)
    piece.put(work.dw[..., None], dw)


def _teacher(work: _Work, piece) -> Tensor:
    """Mean of all heads' attention weights, [C, K]."""
    factor, g = matmul_dtype(work.q), work.k.shape[2]
    q = piece.queries(work.q).to(factor)
    total = 0
    for head in range(g):
        keys, *spoilt = piece.keys(work.k, head, factor, work.sound)
        own = q.unflatten(1, (g, -1))[:, head]
        for some in work.some_heads(own.shape[1], len(q), keys.shape[1]):
            x = gathers.scores(own[:, some], keys, work.scale)
            total = total + gathers.softmax_(gathers.hide(x, piece.hidden, *spoilt))[0].sum(1)
    return total / work.q.shape[2]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x in inputs[2:5]]


def _differentiate(ctx, dloss, *_):
    given = [(x * dloss).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return None, None, *given, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)
