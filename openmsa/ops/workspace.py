"""How much the portable backends hold at once, and in which precision they multiply."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# The most that a portable operation holds beside inputs, outputs, gradients and their fp32 sums.
WORKSPACE_BYTES = 256 << 20
# What stays in the caches of a CPU: gathers measured 15 and products 3 times faster than beyond.
CACHE_BYTES = 32 << 20


def rows_at_once(bytes_per_row: int, device: torch.device, wanted: int = 1) -> int:
    """How many rows of work to take at once: what the caches hold, or `wanted` if that fits."""
    most = max(1, WORKSPACE_BYTES // bytes_per_row)
    if device.type != "cpu":
        return most
    return min(most, max(1, CACHE_BYTES // bytes_per_row, wanted))


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Sums, softmaxes and statistics: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Factors of a matrix product: as given if the device multiplies them natively, or fp32."""
    if x.device.type == "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        return x.dtype
    native = x.dtype == torch.bfloat16 and x.device.type == "cpu" and _cpu_multiplies_bf16()
    return x.dtype if native else torch.float32


def _cpu_multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Inside an operation the precision is ours: autocast would turn fp32 sums into bf16."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, in one order whatever the device, so that results repeat bit for bit.

    `index_add_` uses atomics on a GPU and `index_put_` uses them on a CPU; each is ordered on the
    other.
    """
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)
