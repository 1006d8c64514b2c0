"""Attention over selected blocks by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.ops import native_calls


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


@torch.library.custom_op("openmsa::cpu_sparse_attention", mutates_args=(), device_types="cpu")
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
    return native_calls.attend(q, k, v, blocks, block_size, scale, cu_seqlens_q, cu_seqlens_k)


@_forward.register_fake
def _(q, k, v, *rest):
    return native_calls.empty_attention(q, v)


@torch.library.custom_op(
    "openmsa::cpu_sparse_attention_backward", mutates_args=(), device_types="cpu"
)
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
    return native_calls.attend_backward(
        dout, q, k, v, blocks, out, lse, block_size, scale, cu_seqlens_q, cu_seqlens_k
    )


@_backward.register_fake
def _(dout, q, k, v, *rest):
    return native_calls.empty_gradients(q, k, v)


def _save(ctx, inputs, output):
    q, k, v, blocks, *numbers, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(q, k, v, blocks, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.numbers = numbers


def _differentiate(ctx, dout, _):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dq, dk, dv = _backward(dout, *tensors, *ctx.numbers, cu_seqlens_q, cu_seqlens_k)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
