"""What the doors refuse, once, before any work. Shapes and plain numbers only: never a tensor's
contents on a device.

The one exception is `cu_seqlens` on the CPU, where reading costs nothing; on an accelerator reading
would stall the queue, so there the caller vouches for them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from openmsa.selection import Selection


def shapes(**tensors: tuple[Tensor, str]) -> None:
    """Rank, floating dtype, one dtype and one device, and equal sizes wherever two letters agree.

    Each argument is (tensor, letters), such as q=(q, "b t h d").
    """
    sizes: dict[str, tuple[int, str]] = {}
    first_name, (first, _) = next(iter(tensors.items()))
    for name, (tensor, letters) in tensors.items():
        wanted = "[" + letters.replace(" ", ", ") + "]"
        if tensor.dim() != len(letters.split()):
            raise ValueError(f"{name} must be {wanted}, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}; convert it first")
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} but {first_name} is {first.dtype}; "
                "convert one, or use autocast"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}")
        for letter, size in zip(letters.split(), tensor.shape, strict=True):
            known, owner = sizes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(
                    f"{name} must be {wanted}: {letter} is {known} in {owner} but {size} in {name} "
                    f"(shape {tuple(tensor.shape)})"
                )


def heads(q: Tensor, k: Tensor) -> None:
    """Query heads must be a multiple of KV heads; no dimension of a head may be 0."""
    h, g = q.shape[2], k.shape[2]
    if g < 1 or h < 1 or h % g:
        raise ValueError(f"the {h} heads of q must be a multiple of the {g} KV heads of k")
    if q.shape[3] < 1:
        raise ValueError("q must have at least 1 channel per head, got 0")


def index_belongs(q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor) -> None:
    """One index query per KV head and query token, one index key per key token, on the same
    device."""
    wanted = (*q.shape[:2], k.shape[2])
    if tuple(q_index.shape[:3]) != wanted:
        raise ValueError(
            f"q_index must be [b, t, g, d_index] with b, t, g = {wanted} as in q and k, "
            f"got shape {tuple(q_index.shape)}"
        )
    if k_index.shape[1] != k.shape[1]:
        raise ValueError(f"k_index has {k_index.shape[1]} tokens but k has {k.shape[1]}")
    if q_index.device != q.device:
        raise ValueError(f"q_index is on {q_index.device} but q is on {q.device}")


def positive(**numbers: int) -> None:
    """Whole numbers of at least 1."""
    for name, number in numbers.items():
        whole(name, number, 1)


def forced(local_blocks: int, sink_blocks: int, top_k: int) -> None:
    """Blocks that are always kept use slots, so they must fit into top_k."""
    whole("local_blocks", local_blocks, 0)
    whole("sink_blocks", sink_blocks, 0)
    if local_blocks + sink_blocks > top_k:
        raise ValueError(
            f"top_k={top_k} cannot hold {local_blocks + sink_blocks} blocks that are always kept "
            f"(local_blocks={local_blocks} + sink_blocks={sink_blocks}); raise top_k or force fewer"
        )


def windows(kernel: int, stride: int, block_size: int) -> None:
    """Windows of `kernel` tokens, one every `stride`, leave out no token and begin where blocks
    do."""
    if stride > kernel:
        raise ValueError(
            f"stride={stride} must be at most kernel={kernel}, or tokens between windows are unread"
        )
    if block_size % stride:
        raise ValueError(
            f"block_size={block_size} must be a multiple of stride={stride}, so that every block "
            "begins with a window"
        )


def whole(name: str, number: int, least: int) -> None:
    """One whole number of at least `least`."""
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")


def layers(numbers) -> tuple[int, ...] | None:
    """Layer numbers, each once, ascending; None for every layer."""
    if numbers is None:
        return None
    if isinstance(numbers, (str, int)):
        raise ValueError(f"layers must be a list of layer numbers or None, got {numbers!r}")
    for number in numbers:
        whole("layers", number, 0)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"layers must name each layer once, got {tuple(numbers)}")
    return tuple(sorted(numbers))


def scale_or_default(name: str, scale: float | None, dim: int) -> float:
    """`scale` itself, which must be finite, or 1 / sqrt(dim)."""
    if scale is None:
        return dim**-0.5
    if isinstance(scale, Tensor) or not math.isfinite(scale):
        raise ValueError(
            f"{name} must be a finite number, got {scale!r}; leave it out for 1/sqrt({dim})"
        )
    return float(scale)


def selection(chosen: Selection, q: Tensor, groups: tuple[int, ...]) -> None:
    """The selection belongs to these queries and names one choice for each of `groups` groups."""
    if not isinstance(chosen, Selection):
        raise ValueError(
            f"selection must be a Selection, got {type(chosen).__name__}; wrap block numbers in it"
        )
    b, g, t, _ = chosen.blocks.shape
    if (b, t) != (q.shape[0], q.shape[1]):
        raise ValueError(
            f"selection.blocks {tuple(chosen.blocks.shape)} is for batch {b} and {t} query tokens, "
            f"but q has batch {q.shape[0]} and {q.shape[1]}"
        )
    if g not in groups:
        raise ValueError(
            f"selection.blocks must have {_either(groups)} groups (second size), got {g}"
        )
    if chosen.blocks.device != q.device:
        raise ValueError(f"selection.blocks is on {chosen.blocks.device} but q is on {q.device}")


def _either(numbers: tuple[int, ...]) -> str:
    return " or ".join(str(n) for n in dict.fromkeys(numbers))


def per_query(name: str, tensor: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    """An optional tensor with a value per query token (or token and head)."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device} but q is on {q.device}")


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Query tokens must fit the key tokens. Returns both borders, cu_seqlens_q standing for both if
    t equals s."""
    t, s = q.shape[1], k.shape[1]
    if cu_seqlens_q is None and cu_seqlens_k is None:
        if t > s:
            raise ValueError(
                f"{t} query tokens cannot be the last of {s} key tokens; pass at least {t} keys"
            )
        return None, None
    if cu_seqlens_q is None or (cu_seqlens_k is None and t != s):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(
            f"{missing} is missing: packed sequences need both cu_seqlens_q and cu_seqlens_k"
        )
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if q.shape[0] != 1:
        raise ValueError(
            f"packed sequences are batch 1, got batch {q.shape[0]}; concatenate along tokens"
        )
    for name, borders in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if borders.dim() != 1 or borders.dtype != torch.int32 or borders.shape[0] < 2:
            raise ValueError(
                f"{name} must be int32 [sequences + 1], got {borders.dtype} {tuple(borders.shape)}"
            )
        if borders.device != q.device:
            raise ValueError(f"{name} is on {borders.device} but q is on {q.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {cu_seqlens_q.shape[0]} and "
            f"{cu_seqlens_k.shape[0]}"
        )
    if readable(cu_seqlens_q) and readable(cu_seqlens_k):
        _borders(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), t, s)
    return cu_seqlens_q, cu_seqlens_k


def readable(borders: Tensor) -> bool:
    """Reading is free: an ordinary CPU tensor, and nobody is tracing."""
    return (
        borders.device.type == "cpu"
        and type(borders) is Tensor
        and not torch.compiler.is_compiling()
    )


def _borders(borders_q: list[int], borders_k: list[int], t: int, s: int) -> None:
    for name, borders, total in (("cu_seqlens_q", borders_q, t), ("cu_seqlens_k", borders_k, s)):
        if borders[0] != 0 or borders[-1] != total:
            raise ValueError(
                f"{name} must start at 0 and end at the {total} tokens given, "
                f"got {borders[0]} ... {borders[-1]}"
            )
        for i, (here, there) in enumerate(pairwise(borders)):
            if there < here:
                raise ValueError(
                    f"{name} must ascend, but entry {i} is {here} and entry {i + 1} is {there}"
                )
    for i in range(len(borders_q) - 1):
        queries, keys = borders_q[i + 1] - borders_q[i], borders_k[i + 1] - borders_k[i]
        if queries > keys:
            raise ValueError(f"sequence {i} has {queries} query tokens but only {keys} key tokens")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, as torch's own attention does."""
    if not _autocast_is_on(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def one_dtype(q_index: Tensor, k_index: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast the two may differ and meet in the wider dtype: index scores stay fp32."""
    if not _autocast_is_on(q_index):
        return q_index, k_index
    dtype = torch.promote_types(q_index.dtype, k_index.dtype)
    return q_index.to(dtype), k_index.to(dtype)


def _autocast_is_on(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
