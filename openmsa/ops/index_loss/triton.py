"""KL(attention || index) on a GPU: value and gradient from stored lse, no weight kept in memory.

Two kernels (`triton_loss`). One owns queries: it forms the student's lse, then the loss and
dq_index. One owns blocks of keys and forms dk_index from the list of their readers, a sum for each
group, which are then added. The loss is one number, so its backward only multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openmsa.ops import triton_launch
from openmsa.ops.gpu import gpu_of
from openmsa.selection import Selection


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


@torch.library.custom_op("openmsa::triton_index_loss", mutates_args=())
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
    if q_index.numel() == 0 or (blocks is not None and blocks.numel() == 0):
        return tuple(x.zero_() for x in _empty(q_index, k_index, with_gradient))
    weights = q.new_ones(q.shape[:2]) if row_weights is None else row_weights
    weights = weights.to(torch.float32).contiguous()
    block = None if blocks is None else block_size
    work = _Work(q, k, q_index, k_index, blocks, block, cu_seqlens_q, cu_seqlens_k)
    lse = work.lse(scale) if lse is None else lse.to(torch.float32).contiguous()
    kl, student_lse, dq = work.over_queries(lse, weights, scale, index_scale)
    share = weights.sum() * k.shape[2]
    share = torch.where(share == 0, 0, 1 / share)
    loss = (kl * weights[..., None]).sum() * share
    if not with_gradient:
        return loss, dq.new_empty(0), dq.new_empty(0)
    dk = work.over_keys(lse, weights, student_lse, scale, index_scale)
    return loss, dq.mul_(share * index_scale), dk.mul_(share * index_scale)


@_forward.register_fake
def _(q, k, q_index, k_index, *rest):
    return _empty(q_index, k_index, with_gradient=rest[-1])


def _empty(q_index: Tensor, k_index: Tensor, with_gradient: bool) -> tuple[Tensor, ...]:
    shapes = ((), q_index.shape, k_index.shape) if with_gradient else ((), (0,), (0,))
    return tuple(q_index.new_empty(shape, dtype=torch.float32) for shape in shapes)


@dataclass
class _Work:
    """One call: what goes in, where queries stand, and how the kernels are shaped."""

    q: Tensor
    k: Tensor
    q_index: Tensor
    k_index: Tensor
    blocks: Tensor | None
    block_size: int | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None

    def __post_init__(self):
        from openmsa.ops import triton_rows

        tensors = (self.q, self.k, self.q_index, self.k_index)
        self.q, self.k, self.q_index, self.k_index = triton_rows.side_by_side(*tensors)
        if self.blocks is not None:
            self.blocks = self.blocks.expand(-1, self.k.shape[2], -1, -1)

    @cached_property
    def places(self):
        from openmsa.ops import triton_tiles

        t, s = self.q.shape[1], self.k.shape[1]
        return triton_tiles.places_of(t, s, self.cu_seqlens_q, self.cu_seqlens_k, self.q.device)

    @property
    def strides(self):
        from openmsa.ops import triton_rows

        keys = (*self.k_index.stride()[:2], 0)
        shapes = (self.q.stride()[:3], self.k.stride()[:3], keys, self.q_index.stride()[:3])
        return triton_rows.Strides(*shapes)

    def shaped(self, rule):
        """The kernels' shape, with the index's width for that of a value, and their launch."""
        from openmsa.ops import triton_rows, triton_tiles

        (t, h, d), di, g = self.q.shape[1:], self.q_index.shape[3], self.k.shape[2]
        gpu = gpu_of(self.q.device)
        itemsize = max(self.q.element_size(), self.q_index.element_size())
        launch = rule(triton_tiles.padded(d) + triton_tiles.padded(di), itemsize, gpu)
        rows = triton_tiles.rows_for(t, h // g, launch.rows)
        keys, precision = launch.keys, gpu.fp32_precision if itemsize == 4 else "ieee"
        arguments = (self.q, self.k, di, rows, g, self.block_size, keys, precision)
        return triton_rows.shape_of(*arguments), launch

    def members(self, shape):
        from openmsa.ops import triton_tiles

        if self.blocks is None:
            return None
        tokens = shape.rows.tokens
        return triton_tiles.members_of(self.blocks, self.block_size, self.places, tokens)

    def lse(self, scale: float) -> Tensor:
        """What attention would have returned on this support: [b, t, h]."""
        from openmsa.ops import triton_attend, triton_tiles

        shape, launch = self.shaped(triton_launch.for_tiles)
        shape = shape._replace(dv=1, DV=triton_tiles.padded(1))
        members, value = self.members(shape), self.k[..., :1]
        arguments = (members, self.places, shape, scale, 1, launch.options)
        return triton_attend.forward(self.q, self.k, value, *arguments)[1]

    def over_queries(self, lse, weights, scale: float, index_scale: float):
        """kl and the student's lse [b, t, g], dq_index; neither weighted nor scaled at the end."""
        from openmsa.ops import triton_rows
        from openmsa.ops.index_loss import triton_loss

        (b, t), g = self.q.shape[:2], self.k.shape[2]
        shape, launch = self.shaped(triton_launch.for_losses)
        kl, student_lse = (lse.new_empty(b, t, g) for _ in range(2))
        dq = torch.empty(self.q_index.shape, dtype=torch.float32, device=lse.device)
        members = triton_rows.reads_of(self.members(shape), self.k.shape[1], shape, lse)
        triton_loss.tile_loss[(b * g * -(-t // shape.rows.tokens),)](
            self.q, self.k, self.q_index, self.k_index, lse, weights, kl, student_lse, dq,
            members, self.places, self.strides, b, t, scale, index_scale, shape, **launch.options,
        )  # fmt: skip
        return kl, student_lse, dq

    def over_keys(self, lse, weights, student_lse, scale: float, index_scale: float) -> Tensor:
        """dk_index [b, s, di] before its factor."""
        from openmsa.ops import triton_attend_backward, triton_owners, triton_tiles
        from openmsa.ops.index_loss import triton_loss
        from openmsa.ops.reverse_index import key_rows, reverse_index

        (b, s, g), t, di = self.k.shape[:3], self.q.shape[1], self.q_index.shape[3]
        shape, launch = self.shaped(triton_launch.for_owners)
        rows = key_rows(s, shape.block, self.cu_seqlens_k, lse.device)
        if self.blocks is None:
            items, pieces = triton_owners.whole_items(rows, self.places, b * g), None
        else:
            packed = {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}
            index = reverse_index(Selection(self.blocks, shape.block), s, **packed)
            items, pieces = triton_owners.chosen_items(index, 4 * shape.block * di)
        number = rows.first.shape[0]
        dk = lse.new_empty(b, s, g, di)
        parts = lse.new_empty((0 if pieces is None else pieces.slots) * shape.block * di)
        triton_loss.owner_loss[(items.slot.shape[0] * -(-shape.block // shape.BN),)](
            self.q, self.k, self.q_index, self.k_index, lse, weights, student_lse, dk, parts,
            items, rows, self.places, self.strides, number, s, t, scale, index_scale, shape,
            **launch.options,
        )  # fmt: skip
        if parts.numel():
            sums = shape._replace(d=di, D=shape.DV, dv=0, DV=triton_tiles.padded(1))
            triton_attend_backward.add_pieces[(b * g * number * -(-shape.block // 16),)](
                parts, pieces, rows, dk, dk, number, s, sums
            )
        return dk.sum(2)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:], inputs[2], inputs[3])


def _differentiate(ctx, dloss, _, __):
    dq, dk, q_index, k_index = ctx.saved_tensors
    nothing = [None] * 9
    return None, None, (dq * dloss).to(q_index.dtype), (dk * dloss).to(k_index.dtype), *nothing


_forward.register_autograd(_differentiate, setup_context=_save)
