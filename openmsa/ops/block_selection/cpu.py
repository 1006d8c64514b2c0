"""Block selection by the native kernels: scores, their maxima and the best k in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa import native
from openmsa.ops.native_calls import borders_of, threads, view


def select_blocks(
    q_index: Tensor,
    k_index: Tensor,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int,
    sink_blocks: int,
    index_scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """q_index [b, t, g, di], k_index [b, s, di] -> int32 [b, g, t, top_k]; see the door."""
    numbers = (block_size, top_k, local_blocks, sink_blocks, index_scale)
    return _select(q_index.detach(), k_index.detach(), *numbers, cu_seqlens_q, cu_seqlens_k)


@torch.library.custom_op("openmsa::cpu_select_blocks", mutates_args=(), device_types="cpu")
def _select(
    q_index: Tensor,
    k_index: Tensor,
    block_size: int,
    top_k: int,
    local_blocks: int,
    sink_blocks: int,
    index_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    blocks = _empty(q_index, top_k)
    native.select_blocks(
        threads(q_index.numel() * k_index.shape[1]),
        *(view(q_index), view(k_index[:, :, None]), blocks.data_ptr()),
        *(block_size, top_k, local_blocks, sink_blocks, index_scale),
        borders_of(cu_seqlens_q, cu_seqlens_k),
    )
    return blocks


@_select.register_fake
def _(q_index, k_index, block_size, top_k, *rest):
    return _empty(q_index, top_k)


def _empty(q_index: Tensor, top_k: int) -> Tensor:
    b, t, g, _ = q_index.shape
    return q_index.new_empty(b, g, t, top_k, dtype=torch.int32)
