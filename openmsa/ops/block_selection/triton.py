"""Block selection on a GPU: scores, their maxima and the best k in one pass, no score in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.ops.gpu import Gpu, gpu_of

# Candidates of one row that the merging program holds at once.
MOST_CANDIDATES = 8192
# A split with fewer blocks is not worth its list.
LEAST_BLOCKS = 8


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


@torch.library.custom_op("openmsa::triton_select_blocks", mutates_args=())
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
    from openmsa.ops.block_selection.triton_select import merge_kernel, select_kernel

    blocks = _empty(q_index, top_k)
    if blocks.numel() == 0:
        return blocks
    (b, t, g, d), s = q_index.shape, k_index.shape[1]
    gpu = gpu_of(q_index.device)
    if q_index.dtype == torch.float8_e4m3fn and gpu.capability < 89:  # it has no fp8: exact in bf16
        q_index, k_index = q_index.bfloat16(), k_index.bfloat16()
    q_index = q_index.contiguous()
    k_index = k_index if k_index.stride(2) == 1 or d == 1 else k_index.contiguous()
    shape = launch_shape(t * g, d, q_index.element_size(), block_size, top_k, gpu)
    tiles, num_tiles = None, -(-t * g // shape["ROWS"])
    if cu_seqlens_q is not None:
        num_tiles += cu_seqlens_q.shape[0] - 1
        tiles = _tiles(cu_seqlens_q, cu_seqlens_k, g, shape["ROWS"], num_tiles)
    splits = _splits(num_tiles * b, -(-s // block_size), top_k, gpu)
    out = blocks if splits == 1 else blocks.new_empty(b, t * g, splits, top_k, dtype=torch.int64)
    select_kernel[num_tiles, b, splits](
        *(q_index, k_index, out, tiles, t, s, k_index.stride(0), k_index.stride(1)),
        *(index_scale, local_blocks, sink_blocks, g, d, block_size, top_k),
        SCALE_FIRST=index_scale <= 0,
        PRECISION=gpu.fp32_precision if q_index.dtype == torch.float32 else "ieee",
        **shape,
    )
    if splits > 1:
        candidates = 1 << (splits * top_k - 1).bit_length()
        merge_kernel[t * g, b](out, blocks, t, splits, g, top_k, candidates, num_warps=8)
    return blocks


@_select.register_fake
def _(q_index, k_index, block_size, top_k, *rest):
    return _empty(q_index, top_k)


def _empty(q_index: Tensor, top_k: int) -> Tensor:
    b, t, g, _ = q_index.shape
    return q_index.new_empty(b, g, t, top_k, dtype=torch.int32)


def launch_shape(
    rows: int, d: int, itemsize: int, block_size: int, top_k: int, gpu: Gpu
) -> dict[str, int]:
    """Rows and keys of a program's tile, its warps and stages, within the GPU's shared memory."""
    dim = max(16, 1 << (d - 1).bit_length())
    chunk = min(dim, 32 if itemsize == 4 and not gpu.hip else 256)
    wide = dim * itemsize > 256
    keys = 64 if wide or gpu.capability < 90 else 128
    keys = min(keys, max(16, 1 << (block_size - 1).bit_length()))
    most = 64 if wide or top_k > 32 else 128
    rows = min(most, max(16, 1 << (rows - 1).bit_length()))
    tile, resident = keys * dim * itemsize, rows * dim * itemsize
    if chunk < dim:
        tile, resident = tile + resident, 0
    if gpu.hip:  # keys wait in registers and the queries stay there
        stages = 2 if tile <= gpu.shared_bytes else 1
    else:  # two programs share a unit: while one ranks its maxima, the other multiplies
        stages = (gpu.shared_bytes // 2 - resident) // tile
    crowded = top_k > 32 or (rows == 32 and not gpu.hip)  # four warps would spill registers
    warps = 8 if crowded else 4
    sizes = {"ROWS": rows, "KEYS": keys, "CHUNK": chunk}
    return {**sizes, "num_warps": warps, "num_stages": max(1, min(4, stages))}


def _splits(tiles: int, blocks: int, top_k: int, gpu: Gpu) -> int:
    """Into how many parts the keys are cut so that every unit has two programs."""
    wanted = -(-2 * gpu.units // tiles)
    return max(1, min(wanted, blocks // LEAST_BLOCKS, MOST_CANDIDATES // top_k))


def _tiles(cu_q: Tensor, cu_k: Tensor, g: int, rows: int, number: int) -> Tensor:
    """int32 [number, 5]: first query, queries, first key, keys of the sequence, and which of its
    tiles this is. Tiles too many have no queries."""
    ends = ((cu_q.diff() * g + rows - 1) // rows).cumsum(0)
    tile = torch.arange(number, device=cu_q.device)
    sequence = torch.searchsorted(ends, tile, right=True)
    real = sequence < ends.shape[0]
    sequence = sequence.clamp(max=ends.shape[0] - 1)
    starts = torch.nn.functional.pad(ends, (1, 0))[sequence]
    queries, keys = cu_q.diff()[sequence] * real, cu_k.diff()[sequence] * real
    found = (cu_q[sequence], queries, cu_k[sequence], keys, (tile - starts) * real)
    return torch.stack(found, 1).to(torch.int32)
