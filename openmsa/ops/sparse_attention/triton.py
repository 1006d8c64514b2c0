"""Attention over selected blocks on a GPU: tiles of neighbouring queries over their blocks' union.

The kernels are in `openmsa.ops.triton_attend` and `openmsa.ops.triton_attend_backward`. Triton is
imported where it runs, so that this file can be read without it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmsa.ops.gpu import Gpu, gpu_of

# Programs of a unit that keep it busy.
PROGRAMS_PER_UNIT = 2


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
    tiles = _tiles(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
    shape, members, places, gpu = tiles
    programs = q.shape[0] * members.count[0].numel() * shape.rows.parts
    splits = splits_for(programs, blocks.shape[3] * -(-block_size // shape.BN), gpu)
    launch = launch_of(shape.D + shape.DV, q.element_size(), gpu)
    return triton_attend.forward(q, k, v, members, places, shape, scale, splits, launch)


@_forward.register_fake
def _(q, k, v, blocks, block_size, scale, cu_seqlens_q, cu_seqlens_k):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _tiles(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k):
    """The shape of the kernels, what every tile reads, where its queries stand, and the GPU."""
    from openmsa.ops import triton_rows, triton_tiles

    gpu = gpu_of(q.device)
    t, s = q.shape[1], k.shape[1]
    groups = max(blocks.shape[1], k.shape[2])
    blocks = blocks.expand(-1, groups, -1, -1)
    rows = triton_tiles.rows_for(t, q.shape[2] // groups)
    places = triton_tiles.places_of(t, s, cu_seqlens_q, cu_seqlens_k, q.device)
    members = triton_tiles.members_of(blocks, block_size, places, rows.tokens)
    keys = keys_at_once(q, v, gpu)
    shape = triton_rows.shape_of(
        q, k, v.shape[3], rows, groups, block_size, keys, gpu.fp32_precision
    )
    return shape, members, places, gpu


def keys_at_once(q: Tensor, v: Tensor, gpu: Gpu) -> int:
    """Keys of a step: as many as leave room for a second step in flight."""
    wide = max(q.shape[3], v.shape[3]) * q.element_size() > 256
    return 32 if wide or gpu.hip else 64


def launch_of(width: int, itemsize: int, gpu: Gpu) -> dict[str, int]:
    """width: channels of a key and of a value together, padded."""
    wide = width * itemsize > 512
    return {"num_warps": 8 if wide else 4, "num_stages": 2 if wide or gpu.capability < 90 else 3}


def splits_for(programs: int, steps: int, gpu: Gpu) -> int:
    """Into how many parts a tile's reading is cut so that every unit has work."""
    return max(1, min(PROGRAMS_PER_UNIT * gpu.units // max(1, programs), steps))


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

    if blocks.numel() == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    tiles = _tiles(q, k, v, blocks, block_size, cu_seqlens_q, cu_seqlens_k)
    shape, members, places, gpu = tiles
    launch = launch_of(shape.D + shape.DV, q.element_size(), gpu)
    dout, inputs = dout.contiguous(), (q, k, v, lse)
    dq, delta = backward.query_gradients(dout, out, *inputs, members, places, shape, scale, launch)
    rows = triton_owners.key_rows(k.shape[1], block_size, cu_seqlens_k, q.device)
    slot_bytes = 4 * block_size * (q.shape[3] + v.shape[3])
    blocks = blocks.expand(-1, shape.groups, -1, -1)
    items, pieces = triton_owners.chosen_items(blocks, block_size, rows, places, slot_bytes)
    dk, dv = backward.key_gradients(
        dout, *inputs, delta, items, pieces, rows, places, shape, scale, launch
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
