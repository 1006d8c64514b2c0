"""Causal attention by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.ops import native_calls


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


@torch.library.custom_op("openmsa::cpu_dense_attention", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return native_calls.attend(q, k, v, None, 1, scale, cu_seqlens_q, cu_seqlens_k)


@_forward.register_fake
def _(q, k, v, *rest):
    return native_calls.empty_attention(q, v)


@torch.library.custom_op(
    "openmsa::cpu_dense_attention_backward", mutates_args=(), device_types="cpu"
)
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return native_calls.attend_backward(
        dout, q, k, v, None, out, lse, 1, scale, cu_seqlens_q, cu_seqlens_k
    )


@_backward.register_fake
def _(dout, q, k, v, *rest):
    return native_calls.empty_gradients(q, k, v)


def _save(ctx, inputs, output):
    q, k, v, scale, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.scale = scale


def _differentiate(ctx, dout, _):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    return *_backward(dout, *tensors, ctx.scale, cu_seqlens_q, cu_seqlens_k), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
