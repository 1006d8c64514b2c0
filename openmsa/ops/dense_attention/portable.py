"""Causal attention in bounded memory: a piece of queries against its whole prefix at a time.

Forward:
    X = q K * scale;  out = softmax(X) V;  lse = log sum exp X
Backward:
    P = softmax(X);  dP = dout V;  dX = P (dP - sum P dP)
    dV = P dout;  dK = dX q * scale;  dq = dX K * scale

On a CPU, torch's own fused attention does ordinary training shapes faster. On a GPU its backward
adds in any order, so it would not repeat bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.ops import prefixes, workspace
from openmsa.ops.workspace import accumulate_dtype, matmul_dtype, no_autocast


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, dv] -> out [b, t, h, dv], lse [b, t, h]; see the
    door."""
    if cu_seqlens_q is None and _fused_serves(q, k, v):
        return _fused(q, k, v, scale)
    return _forward(q, k, v, scale, cu_seqlens_q, cu_seqlens_k)


def _fused_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    b, t, h, d = q.shape
    # It wants a key and a value per query head, so these copies and their gradients must fit.
    copies = 4 * b * h * t * d * q.element_size()
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and 1 < t == k.shape[1]
        and d == v.shape[3]
        and copies <= workspace.WORKSPACE_BYTES
    )


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    r = q.shape[2] // k.shape[2]
    spoilt = ~(k.detach().sum(-1, dtype=torch.float32) + v.detach().sum(-1)).isfinite()
    k, v = (x.masked_fill(spoilt[..., None], 0).repeat_interleave(r, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=scale
    )
    # Zeroed above so that 0 * NaN cannot reach earlier queries; those that do see it become NaN
    # here.
    sees = (spoilt.cumsum(1) > 0).repeat_interleave(r, 2)
    out = out.transpose(1, 2).masked_fill(sees[..., None], torch.nan)
    return out, lse.transpose(1, 2).masked_fill(sees, torch.nan)


@torch.library.custom_op("openmsa::portable_dense_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = _empty(q, v)
    g, factor = k.shape[2], matmul_dtype(q)
    with no_autocast(q):
        poison, k, v = prefixes.clean(q.shape[1], k, v)
        for piece in prefixes.pieces(q, k, cu_seqlens_q, cu_seqlens_k, _BYTES_PER_SCORE):
            queries = prefixes.queries_of(q, piece, g, factor)
            keys, values = (prefixes.keys_of(x, piece, factor) for x in (k, v))
            x = prefixes.scores(queries, keys, piece, scale, poison).flatten(1, 2)
            top = x.amax(-1, keepdim=True)
            total = x.sub_(top).exp_().sum(-1, keepdim=True)
            part = prefixes.product(x.to(factor), values).to(x.dtype).div_(total)
            prefixes.put_queries(out, piece, g, part)
            prefixes.put_queries(lse[..., None], piece, g, top + total.log())
    return out, lse


# The scores, their gradient, and both once more as factors.
_BYTES_PER_SCORE = 16


@_forward.register_fake
def _(q, k, v, scale, cu_seqlens_q, cu_seqlens_k):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q))


@torch.library.custom_op("openmsa::portable_dense_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    g, factor, sums = k.shape[2], matmul_dtype(q), accumulate_dtype(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=sums) for x in (k, v))
    with no_autocast(q):
        poison, clean_k, clean_v = prefixes.clean(q.shape[1], k, v)
        for piece in prefixes.pieces(q, k, cu_seqlens_q, cu_seqlens_k, _BYTES_PER_SCORE):
            queries, douts = (prefixes.queries_of(x, piece, g, factor) for x in (q, dout))
            keys, values = (prefixes.keys_of(x, piece, factor) for x in (clean_k, clean_v))
            p = prefixes.scores(queries, keys, piece, scale, poison).flatten(1, 2).softmax(-1)
            here = piece.batch, piece.keys, piece.heads
            dv[here].add_(prefixes.product_over_rows(p.to(factor), douts).transpose(0, 1))
            # sum P dP equals dout . out, but that form rounds differently from dP.
            dp = prefixes.product(douts, values.mT).to(sums)
            dx = torch.ops.aten._softmax_backward_data(dp, p, -1, sums).mul_(scale).to(factor)
            dk[here].add_(prefixes.product_over_rows(dx, queries).transpose(0, 1))
            prefixes.put_queries(dq, piece, g, prefixes.product(dx, keys))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(dout, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, scale, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
    ctx.scale = scale


def _differentiate(ctx, dout, _):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    return *_backward(dout, *tensors, ctx.scale, cu_seqlens_q, cu_seqlens_k), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
