"""Which queries read a block: the lists from which a program that owns a block sums its gradients.

    row     one block of keys of one sequence; rows are numbered through the sequences
    owner   a row, for one group of one batch: number (batch * groups + group) * rows + row
    item    a piece of an owner's list, one program; a popular block has several

Nothing here waits for the device: numbers of rows and items are bounds that shapes give.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmsa.ops.triton_tiles import Places, owner_of

# Sums of popular blocks' pieces, until they are added.
PARTIAL_BYTES = 128 << 20


class KeyRows(NamedTuple):
    """Key tokens of every row, int64 [rows]; a row too many is empty."""

    first: Tensor
    end: Tensor


class Items(NamedTuple):
    """Lists of queries, cut into items."""

    query: Tensor  # int32 [pairs] query tokens, t for none
    owner: Tensor  # int64 [items]
    begin: Tensor  # int64 [items] first place in `query`
    end: Tensor  # int64 [items]
    slot: Tensor  # int64 [items] where to put a partial sum, -1: the sum is whole, -2: no item


class Pieces(NamedTuple):
    """What the owners of several items must add."""

    first: Tensor  # int64 [owners] first slot
    count: Tensor  # int64 [owners] number of slots, 0 for a sum that is whole
    slots: int


def key_rows(s: int, block_size: int, cu_k: Tensor | None, device) -> KeyRows:
    """The blocks of every sequence, one after the other."""
    ends = torch.full((1,), s, device=device) if cu_k is None else cu_k[1:].long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    row0 = ((ends - starts + block_size - 1) // block_size).cumsum(0)
    row0 = torch.cat([row0.new_zeros(1), row0])
    rows = -(-s // block_size) if cu_k is None else s // block_size + ends.shape[0]
    of_row = owner_of(row0[1:], rows)
    first = starts[of_row] + (torch.arange(rows, device=device) - row0[of_row]) * block_size
    end = torch.minimum(first + block_size, ends[of_row])
    return KeyRows(first, end)


def whole_items(rows: KeyRows, places: Places, copies: int) -> Items:
    """Every query that sees a row's first key, for b * groups copies of the rows."""
    begin = torch.searchsorted(places.position, rows.first)
    end = torch.searchsorted(places.start, rows.first, right=True)
    end = torch.where(rows.first < rows.end, end, begin)
    owner = torch.arange(copies * rows.first.shape[0], device=begin.device)
    slot = torch.full_like(owner, -1)
    query = torch.arange(places.start.shape[0], dtype=torch.int32, device=begin.device)
    return Items(query, owner, begin.repeat(copies), end.repeat(copies), slot)


def chosen_items(
    blocks: Tensor,
    block_size: int,
    rows: KeyRows,
    places: Places,
    slot_bytes: int,
) -> tuple[Items, Pieces]:
    """blocks [b, groups, t, k] in any order; slot_bytes: the size of a partial sum."""
    b, groups, t, k = blocks.shape
    number = rows.first.shape[0]
    owners, pairs = b * groups * number, blocks.numel()
    own = (places.position - places.start) // block_size
    first_row = torch.searchsorted(rows.first, places.start)
    copy = torch.arange(b * groups, device=blocks.device).view(b, groups, 1, 1)
    there = (blocks >= 0) & (blocks <= own[:, None])
    key = torch.where(there, copy * number + first_row[:, None] + blocks, owners)
    key, pair = key.flatten().to(torch.int32 if owners < 1 << 31 else torch.int64).sort(stable=True)
    query = pair // k % t
    again = torch.zeros_like(there).flatten()
    again[1:] = (key[1:] == key[:-1]) & (pair[1:] // k == pair[:-1] // k)
    query = torch.where(again, t, query).to(torch.int32)
    begin = torch.searchsorted(key, torch.arange(owners + 1, device=key.device, dtype=key.dtype))
    return _cut(query, begin, pairs, owners, slot_bytes)


def _cut(query, begin, pairs, owners, slot_bytes) -> tuple[Items, Pieces]:
    """Cut lists query[begin[i] : begin[i + 1]] so that no item has many times the average."""
    longest = max(64, -(-4 * pairs // owners), -(-2 * pairs * slot_bytes // PARTIAL_BYTES))
    pieces = ((begin.diff() + longest - 1) // longest).clamp(min=1)
    last = pieces.cumsum(0)
    items = owners + pairs // longest
    owner = torch.searchsorted(last, torch.arange(items, device=begin.device), right=True)
    real = owner < owners
    owner = owner.clamp(max=owners - 1)
    piece = torch.arange(items, device=begin.device) - (last - pieces)[owner]
    several = torch.where(pieces > 1, pieces, 0)
    first_slot = several.cumsum(0) - several
    slot = torch.where(pieces[owner] > 1, first_slot[owner] + piece, -1)
    start = torch.where(real, begin[owner] + piece * longest, 0)
    end = torch.where(real, torch.minimum(start + longest, begin[owner + 1]), 0)
    slots = min(2 * pairs // longest, items)
    found = Items(query, owner, start, end, torch.where(real, slot, -2))
    return found, Pieces(first_slot, several, slots)
