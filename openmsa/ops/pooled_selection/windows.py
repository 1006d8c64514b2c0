"""Windows: runs of `kernel` tokens, one beginning every `stride` tokens of a sequence.

Window j holds tokens j * stride ... j * stride + kernel - 1 of its sequence, and exists if all of
them do. Windows of packed sequences are numbered through, sequence by sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmsa.ops import checks
from openmsa.ops.workspace import accumulate_dtype, rows_at_once


def num_windows(num_keys: int, kernel: int, stride: int) -> int:
    """How many windows lie wholly within `num_keys` tokens."""
    return max(0, (num_keys - kernel) // stride + 1)


def window_borders(cu_seqlens_k: Tensor, kernel: int, stride: int) -> Tensor:
    """First window of every packed sequence, and one past the last: int32 [sequences + 1]."""
    windows = ((cu_seqlens_k.diff() - kernel) // stride + 1).clamp(min=0)
    return torch.nn.functional.pad(windows.cumsum(0, dtype=torch.int32), (1, 0))


def mean_pool(
    k: Tensor, *, kernel: int, stride: int, cu_seqlens_k: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The mean of every window: k [b, s, g, d] -> [b, n, g, d], and its `window_borders`.

    Sums are fp32 (fp64 for fp64) and rounded once, to the dtype of k. Packed sequences (batch 1
    with cu_seqlens_k): n is s // stride whatever the lengths, and rows behind the last border are
    zero; unpacked: `num_windows`, and no borders. Without gradient, as what is chosen by it. Raises
    ValueError for a stride above the kernel and for borders that are not those of k.
    """
    k = k.detach()
    checks.shapes(k=(k, "b s g d"))
    checks.positive(kernel=kernel, stride=stride)
    if stride > kernel:
        raise ValueError(f"stride={stride} must be at most kernel={kernel}")
    if cu_seqlens_k is None:
        return _of_sequence(k, kernel, stride), None
    borders = window_borders(cu_seqlens_k, kernel, stride)
    n = k.shape[1] // stride
    if checks.readable(cu_seqlens_k):
        lengths = cu_seqlens_k.diff().tolist()
        if min(lengths) < 0 or cu_seqlens_k[0] != 0 or cu_seqlens_k[-1] != k.shape[1]:
            raise ValueError(
                f"cu_seqlens_k must ascend from 0 to the {k.shape[1]} tokens of k, "
                f"got {cu_seqlens_k.tolist()}"
            )
        alone = k.split(lengths, 1)
        means = torch.cat([_of_sequence(one, kernel, stride) for one in alone], 1)
        return torch.nn.functional.pad(means, (0, 0, 0, 0, 0, n - means.shape[1])), borders
    window = torch.arange(n, device=k.device)
    owner = torch.searchsorted(borders[1:], window, right=True).clamp(max=borders.shape[0] - 2)
    first = cu_seqlens_k[owner] + (window - borders[owner]) * stride
    unused = (window >= borders[-1])[:, None, None]
    return _at(k, first, kernel).masked_fill(unused, 0), borders


# A piece of keys in fp32 that stays in a CPU's second cache: larger ones measured slower.
PIECE_BYTES = 1 << 20


def _of_sequence(k: Tensor, kernel: int, stride: int) -> Tensor:
    """k [b, s, g, d] -> [b, n, g, d]: first sums of the parts that windows have in common."""
    (b, _, g, d), n = k.shape, num_windows(k.shape[1], kernel, stride)
    if n == 0:
        return k.new_empty(b, 0, g, d)
    part, sums = math.gcd(kernel, stride), accumulate_dtype(k)
    size, step = kernel // part, stride // part
    parts = k[:, : (n - 1) * stride + kernel].unflatten(1, (-1, part))
    part_bytes = max(1, 4 * b * part * g * d)
    at_once = rows_at_once(part_bytes, k.device)
    if k.device.type == "cpu":
        at_once = min(at_once, max(1, PIECE_BYTES // part_bytes))
    total = k.new_empty(b, parts.shape[1], g, d, dtype=sums)
    for piece, its_sums in zip(parts.split(at_once, 1), total.split(at_once, 1), strict=True):
        its_sums.copy_(piece.to(sums).sum(2))
    if size > 1:
        shared, total = total, total[:, ::step][:, :n].clone()
        for i in range(1, size):
            total += shared[:, i::step][:, :n]
    return total.div_(kernel).to(k.dtype)


def _at(k: Tensor, first: Tensor, kernel: int) -> Tensor:
    """k [b, s, g, d], the first token of every window [n] -> [b, n, g, d]"""
    b, s, g, d = k.shape
    means = k.new_empty(b, first.shape[0], g, d)
    at_once = rows_at_once(8 * max(1, b * kernel * g * d), k.device)
    for some, out in zip(first.split(at_once), means.split(at_once, 1), strict=True):
        token = (some[:, None] + torch.arange(kernel, device=k.device)).clamp(max=s - 1)
        tokens = k.index_select(1, token.flatten()).unflatten(1, token.shape)
        out.copy_(tokens.mean(2, dtype=accumulate_dtype(k)))
    return means
