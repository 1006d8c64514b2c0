"""Causal attention on a GPU: the kernels of sparse attention with the whole prefix to read.

The forward pass is torch's own cuDNN or flash kernel where dtype, widths, alignment and chip allow
(the rule stands in `openmsa.ops.dense_attention.triton_fused`); the backward pass is always ours,
which repeats bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.ops import triton_launch
from openmsa.ops.gpu import gpu_of, interpreted


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
    return _forward(q, k, v, scale, cu_seqlens_q, cu_seqlens_k)


@torch.library.custom_op("openmsa::triton_dense_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from openmsa.ops import triton_attend, triton_tiles
    from openmsa.ops.dense_attention import triton_fused

    if q.numel() == 0:
        return _empty(q, v)
    (b, t), s = q.shape[:2], k.shape[1]
    places = triton_tiles.places_of(t, s, cu_seqlens_q, cu_seqlens_k, q.device)
    where = {"packed": cu_seqlens_q is not None, "gpu": gpu_of(q.device)}
    if kernel := triton_fused.kernel_for(q, k, v, **where, interpreted=interpreted()):
        return triton_fused.forward(kernel, q, k, v, places, scale, cu_seqlens_q, cu_seqlens_k)
    shape, launch = _shaped(q, k, v, triton_launch.for_prefixes)
    programs = b * shape.groups * shape.rows.parts * -(-t // shape.rows.tokens)
    splits = triton_launch.splits_for(programs, -(-s // shape.BN), where["gpu"])
    return triton_attend.forward(q, k, v, None, places, shape, scale, splits, launch.options)


@_forward.register_fake
def _(q, k, v, scale, cu_seqlens_q, cu_seqlens_k):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _shaped(q: Tensor, k: Tensor, v: Tensor, rule):
    """The kernels' shape and launch by a rule of `triton_launch`."""
    from openmsa.ops import triton_rows, triton_tiles

    t, h, d = q.shape[1:]
    groups, dv, gpu = k.shape[2], v.shape[3], gpu_of(q.device)
    launch = rule(triton_tiles.padded(d) + triton_tiles.padded(dv), q.element_size(), gpu)
    rows = triton_tiles.rows_for(t, h // groups, launch.rows)
    precision = gpu.fp32_precision if q.dtype == torch.float32 else "ieee"
    shape = triton_rows.shape_of(q, k, dv, rows, groups, None, launch.keys, precision)
    return shape, launch


@torch.library.custom_op("openmsa::triton_dense_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from openmsa.ops import triton_attend_backward as backward
    from openmsa.ops import triton_owners, triton_tiles
    from openmsa.ops.reverse_index import key_rows

    if q.numel() == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    places = triton_tiles.places_of(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k, q.device)
    dout, inputs = dout.contiguous(), (q, k, v, lse)
    shape, launch = _shaped(q, k, v, triton_launch.for_prefixes)
    dq, delta = backward.query_gradients(
        dout, out, *inputs, None, places, shape, scale, launch.options
    )
    shape, launch = _shaped(q, k, v, triton_launch.for_owners)
    rows = key_rows(k.shape[1], shape.block, cu_seqlens_k, q.device)
    items = triton_owners.whole_items(rows, places, q.shape[0] * shape.groups)
    dk, dv = backward.key_gradients(
        dout, *inputs, delta, items, None, rows, places, shape, scale, launch.options
    )
    return dq, dk, dv


@_backward.register_fake
def _(dout, out, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, scale, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(output[0], q, k, v, output[1], cu_seqlens_q, cu_seqlens_k)
    ctx.scale = scale


def _differentiate(ctx, dout, _):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    return *_backward(dout, *tensors, ctx.scale, cu_seqlens_q, cu_seqlens_k), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
