"""KL(attention || index) by the native kernels: value and gradients in one call.

The kernels sum over query tokens and groups; the share of each, 1 / (sum of w * groups), is applied
here. The loss is one number, so its backward only multiplies the gradients by another one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa import native
from openmsa.ops.native_calls import blocks_of, borders_of, threads, view


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


@torch.library.custom_op("openmsa::cpu_index_loss", mutates_args=(), device_types="cpu")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, share, dq, dk = _empty(q_index, k_index, with_gradient)
    weights, lse = (None if x is None else x.float().contiguous() for x in (row_weights, lse))
    wanted = with_gradient and q_index.numel() > 0
    keys = k.shape[1] if blocks is None else min(k.shape[1], blocks.shape[3] * block_size)
    total, weight = native.index_loss(
        threads((q.numel() + q_index.numel()) * keys),
        *(view(q), view(k), view(q_index), view(k_index[:, :, None])),
        *(blocks_of(blocks), block_size, scale, index_scale),
        *(0 if x is None else x.data_ptr() for x in (weights, lse)),
        *(x.data_ptr() if wanted else 0 for x in (dq, dk)),
        borders_of(cu_seqlens_q, cu_seqlens_k),
    )
    if with_gradient and not wanted:
        dk.zero_()
    # An empty sum is 0; a sum of weights that is NaN is one, as in the definition.
    loss.fill_(total if weight == 0 else total / weight)
    share.fill_(0 if weight == 0 else 1 / weight)
    return loss, share, dq, dk


@_forward.register_fake
def _(q, k, q_index, k_index, *rest):
    return _empty(q_index, k_index, with_gradient=rest[-1])


def _empty(q_index: Tensor, k_index: Tensor, with_gradient: bool) -> tuple[Tensor, ...]:
    shapes = ((), (), q_index.shape, k_index.shape) if with_gradient else ((), (), (0,), (0,))
    return tuple(q_index.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[2].dtype, inputs[3].dtype


def _differentiate(ctx, dloss, *_):
    share, *gradients = ctx.saved_tensors
    factor = dloss * share
    dq, dk = (x.mul(factor).to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))
    nothing = [None] * 9
    return None, None, dq, dk, *nothing


_forward.register_autograd(_differentiate, setup_context=_save)
