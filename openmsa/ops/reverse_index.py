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


class ReverseIndex(NamedTuple):
    """Lists one after the other. Places of `queries` from begin[-1] on belong to no list."""

    begin: Tensor  # int64 [b * g * rows + 1]
    queries: Tensor  # int32 [b * g * t * k]
    rows: int
    first_key: Tensor  # int64 [rows] a row's first key token


def reverse_index(
    selection: Selection,
    keys: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> ReverseIndex:
    """selection.blocks int32 [b, g, t, k] over `keys` key tokens -> ReverseIndex.

    One stable sort on the device, so that the order never varies. Nothing waits for the device:
    sizes follow from shapes, and with packed sequences a row too many has an empty list.
    """
    blocks, block_size = selection.blocks, selection.block_size
    b, g, t, k = blocks.shape
    device = blocks.device
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.full((2,), t, device=device) * torch.arange(2, device=device)
        cu_seqlens_k = torch.full((2,), keys, device=device) * torch.arange(2, device=device)
        rows = -(-keys // block_size)
    else:
        rows = keys // block_size + cu_seqlens_q.shape[0] - 1
    cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    row0 = torch.nn.functional.pad(((cu_k.diff() + block_size - 1) // block_size).cumsum(0), (1, 0))

    row = torch.arange(rows, device=device)
    of_row = _sequence_of(row, row0)
    first_key = cu_k[of_row] + (row - row0[of_row]) * block_size
    token = torch.arange(t, device=device)
    of_token = _sequence_of(token, cu_q)
    position = token - cu_q[of_token] + cu_k.diff()[of_token] - cu_q.diff()[of_token]

    ordered = blocks.sort(-1).values.long()  # a block named twice lies beside itself
    seen = (ordered >= 0) & (ordered * block_size <= position[:, None])
    seen[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
    copy = torch.arange(b * g, device=device).view(b, g, 1, 1) * rows
    lists = torch.where(seen, copy + row0[of_token][:, None] + ordered, b * g * rows).flatten()
    narrow = torch.int32 if b * g * rows < 1 << 31 else torch.int64
    lists, pair = lists.to(narrow).sort(stable=True)
    begin = torch.searchsorted(lists, torch.arange(b * g * rows + 1, device=device, dtype=narrow))
    return ReverseIndex(begin, (pair // max(k, 1) % max(t, 1)).to(torch.int32), rows, first_key)


def _sequence_of(place: Tensor, borders: Tensor) -> Tensor:
    """The sequence that each place lies in; places beyond the end count to the last."""
    last = borders.shape[0] - 2
    return torch.searchsorted(borders[1:].contiguous(), place, right=True).clamp(max=last)
