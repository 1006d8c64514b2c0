"""Attention over selected blocks on a GPU: tiles of neighbouring queries over their blocks' union.

Blocks with no more tokens than a group has heads are gathered in torch instead: a tile's union of
thousands of tokens would be longer to find than to read.

The kernels are in `openmsa.ops.triton_attend` and `openmsa.ops.triton_attend_backward`. Triton is
imported where it runs, so that this file can be read without it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmsa.ops import gathered_attention as gathered
from openmsa.ops import triton_launch
from openmsa.ops.gpu import gpu_of
from openmsa.selection import Selection


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


@torch.library.custom_op("openmsa::triton_sparse_attention", mutates_args=())
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
    from openmsa.ops import triton_attend

    if blocks.numel() == 0:
        out, lse = _empty(q, v)
        return out.zero_(), lse.fill_(-math.inf)
    if gathered.serves(q, k, blocks, block_size):
        out, lse = _empty(q, v)
        out, lse = out.zero_(), lse.fill_(-math.inf)
        work = gathered.Work(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
        gathered.attend(work, scale, out, lse)
        return out, lse
    work = _Work(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
    shape, launch = work.tiles()
    members = work.members(shape)
    programs = members.count.numel() * shape.rows.parts
    steps = blocks.shape[3] * -(-block_size // shape.BN)
    splits = triton_launch.splits_for(programs, steps, work.gpu)
    return triton_attend.forward(
        q, k, v, members, work.places, shape, scale, splits, launch.options
    )


@_forward.register_fake
def _(q, k, v, blocks, block_size, scale, cu_seqlens_q, cu_seqlens_k):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


class _Work:
    """One call: the GPU, where queries stand, and how the kernels are shaped."""

    def __init__(self, q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k):
        from openmsa.ops import triton_tiles

        self.gpu = gpu_of(q.device)
        self.groups = max(blocks.shape[1], k.shape[2])
        self.blocks = blocks.expand(-1, self.groups, -1, -1)
        self.block_size = block_size
        self.q, self.k, self.dv = q, k, v.shape[3]
        t, s = q.shape[1], k.shape[1]
        self.places = triton_tiles.places_of(t, s, cu_seqlens_q, cu_seqlens_k, q.device)

    def tiles(self):
        return self._shaped(triton_launch.for_tiles)

    def owners(self):
        return self._shaped(triton_launch.for_owners)

    def _shaped(self, rule):
        from openmsa.ops import triton_rows, triton_tiles

        t, h, d = self.q.shape[1:]
        width = triton_tiles.padded(d) + triton_tiles.padded(self.dv)
        launch = rule(width, self.q.element_size(), self.gpu)
        rows = triton_tiles.rows_for(t, h // self.groups, launch.rows)
        full = self.q.dtype == torch.float32
        keys, precision = launch.keys, self.gpu.fp32_precision if full else "ieee"
        shape = triton_rows.shape_of(
            self.q, self.k, self.dv, rows, self.groups, self.block_size, keys, precision
        )
        return shape, launch

    def members(self, shape):
        from openmsa.ops import triton_tiles

        tokens = shape.rows.tokens
        return triton_tiles.members_of(self.blocks, self.block_size, self.places, tokens)


@torch.library.custom_op("openmsa::triton_sparse_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from openmsa.ops import triton_attend_backward as backward
    from openmsa.ops import triton_owners
    from openmsa.ops.reverse_index import key_rows, reverse_index

    if blocks.numel() == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    if gathered.serves(q, k, blocks, block_size):
        work = gathered.Work(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
        return gathered.gradients(work, scale, dout)
    work = _Work(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
    shape, launch = work.tiles()
    dout, inputs = dout.contiguous(), (q, k, v, lse)
    dq, delta = backward.query_gradients(
        dout, out, *inputs, work.members(shape), work.places, shape, scale, launch.options
    )
    rows = key_rows(k.shape[1], block_size, cu_seqlens_k, q.device)
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    index = reverse_index(Selection(work.blocks, block_size), k.shape[1], **packed)
    slot_bytes = 4 * block_size * (q.shape[3] + v.shape[3])
    items, pieces = triton_owners.chosen_items(index, slot_bytes)
    shape, launch = work.owners()
    dk, dv = backward.key_gradients(
        dout, *inputs, delta, items, pieces, rows, work.places, shape, scale, launch.options
    )
    return dq, dk, dv


@_backward.register_fake
def _(dout, out, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, blocks, *numbers, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(output[0], q, k, v, blocks, output[1], cu_seqlens_q, cu_seqlens_k)
    ctx.numbers = numbers


def _differentiate(ctx, dout, _):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dq, dk, dv = _backward(dout, *tensors, *ctx.numbers, cu_seqlens_q, cu_seqlens_k)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
