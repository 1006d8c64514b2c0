"""The reverse of a selection: for every block of keys, the queries that read it.

row    one block of keys of one sequence; the rows of all sequences are numbered through
list   the query tokens that selected a row and see a key of it, ascending, each once

list i = queries[begin[i]] ... queries[begin[i + 1] - 1],   i = (batch * g + group) * rows + row
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmsa.selection import Selection

# Beside its result; what one pair of a query and a block needs meanwhile, sorting included.
WORKSPACE_BYTES, PAIR_BYTES = 192 << 20, 64


class KeyRows(NamedTuple):
    """Key tokens of every row, int64 [rows]; a row too many is empty."""

    first: Tensor
    end: Tensor


class ReverseIndex(NamedTuple):
    """Lists one after the other. Places of `queries` from begin[-1] on belong to no list."""

    begin: Tensor  # int64 [b * g * rows + 1]
    queries: Tensor  # int32 [b * g * t * k]
    rows: int
    first_key: Tensor  # int64 [rows] a row's first key token


def key_rows(
    keys: int, block_size: int, cu_seqlens_k: Tensor | None, device: torch.device
) -> KeyRows:
    """The blocks of every sequence, one after the other. How many there are follows from shapes, so
    packed sequences may leave rows too many."""
    if cu_seqlens_k is None:
        cu_seqlens_k = torch.full((2,), keys, device=device) * torch.arange(2, device=device)
        rows = -(-keys // block_size)
    else:
        rows = keys // block_size + cu_seqlens_k.shape[0] - 1
    cu_k = cu_seqlens_k.long()
    row0 = _first_rows(cu_k, block_size)
    row = torch.arange(rows, device=device)
    sequence = _sequence_of(row, row0)
    first = cu_k[sequence] + (row - row0[sequence]) * block_size
    return KeyRows(first, torch.minimum(first + block_size, cu_k[sequence + 1]))


def reverse_index(
    selection: Selection,
    keys: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> ReverseIndex:
    """selection.blocks int32 [b, g, t, k] over `keys` key tokens -> ReverseIndex.

    A stable sort of each group on the device, so that the order never varies. Nothing waits for the
    device: sizes follow from shapes. Workspace: 64 bytes for each of the t k pairs of as many
    groups as fit 192 MB, one at least (128K tokens, k 16: 134 MB; 1M: 1.1 GB, with no way to sort
    less than a group at once).
    """
    blocks, block_size = selection.blocks, selection.block_size
    b, g, t, k = blocks.shape
    first_key = key_rows(keys, block_size, cu_seqlens_k, blocks.device).first
    rows, pairs, device = first_key.shape[0], t * k, blocks.device
    position, row0 = _places(t, keys, block_size, cu_seqlens_q, cu_seqlens_k, device)
    blocks = blocks.reshape(b * g, t, k)
    at_once = max(1, WORKSPACE_BYTES // (PAIR_BYTES * max(1, pairs)))
    queries = torch.empty(b * g * pairs, dtype=torch.int32, device=device)
    begins, before = [], torch.zeros(1, dtype=torch.int64, device=device)
    for copy in range(0, b * g, at_once):
        piece = blocks[copy : copy + at_once]
        begin, found = _lists(piece, block_size, position, row0, rows)
        # Places behind the last list are written over by the next piece.
        queries[before + torch.arange(found.shape[0], device=device)] = found
        begins.append(before + begin[:-1])
        before = before + begin[-1]
    return ReverseIndex(torch.cat([*begins, before]), queries, rows, first_key)


def _lists(
    blocks: Tensor, block_size: int, position: Tensor, row0: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """blocks [copies, t, k] -> begin [copies * rows + 1] and queries [copies * t * k]"""
    copies, t, k = blocks.shape
    ordered = blocks.sort(-1).values.long()  # a block named twice lies beside itself
    seen = (ordered >= 0) & (ordered * block_size <= position[:, None])
    seen[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
    ordered += row0[:, None] + torch.arange(copies, device=blocks.device)[:, None, None] * rows
    narrow = torch.int32 if copies * rows < 1 << 31 else torch.int64
    lists = ordered.masked_fill_(~seen, copies * rows).flatten().to(narrow)
    lists, pair = lists.sort(stable=True)
    wanted = torch.arange(copies * rows + 1, device=blocks.device, dtype=narrow)
    queries = (pair // max(k, 1)).remainder_(max(t, 1)).to(torch.int32)
    return torch.searchsorted(lists, wanted), queries


def _places(
    t: int, keys: int, block_size: int, cu_q: Tensor | None, cu_k: Tensor | None, device
) -> tuple[Tensor, Tensor]:
    """Of every query token: its position in its sequence, and that sequence's first row; int64."""
    token = torch.arange(t, device=device)
    if cu_q is None:
        return token + (keys - t), torch.zeros_like(token)
    cu_q, cu_k = cu_q.long(), cu_k.long()
    sequence = _sequence_of(token, cu_q)
    position = token - cu_q[sequence] + cu_k.diff()[sequence] - cu_q.diff()[sequence]
    return position, _first_rows(cu_k, block_size)[sequence]


def _first_rows(cu_k: Tensor, block_size: int) -> Tensor:
    """The first row of every sequence, and the number of all rows."""
    sizes = (cu_k.diff() + block_size - 1) // block_size
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _sequence_of(place: Tensor, borders: Tensor) -> Tensor:
    """The sequence that each place lies in; places beyond the end count to the last."""
    last = borders.shape[0] - 2
    return torch.searchsorted(borders[1:].contiguous(), place, right=True).clamp(max=last)
