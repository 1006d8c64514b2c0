"""Which queries read a block: the lists from which a program that owns a block sums its gradients.

    row     one block of keys of one sequence (`openmsa.ops.reverse_index`)
    owner   a row, for one group of one batch: number (batch * groups + group) * rows + row
    item    a piece of an owner's list, one program; a popular block has several

Nothing here waits for the device: numbers of rows and items are bounds that shapes give.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmsa.ops.reverse_index import KeyRows, ReverseIndex
from openmsa.ops.triton_tiles import Places

# Sums of popular blocks' pieces, until they are added.
PARTIAL_BYTES = 128 << 20


class Items(NamedTuple):
    """Lists of queries, cut into items."""

    query: Tensor  # int32 [pairs] query tokens
    owner: Tensor  # int64 [items]
    begin: Tensor  # int64 [items] first place in `query`
    end: Tensor  # int64 [items]
    slot: Tensor  # int64 [items] where to put a partial sum, -1: the sum is whole, -2: no item


class Pieces(NamedTuple):
    """What the owners of several items must add."""

    first: Tensor  # int64 [owners] first slot
    count: Tensor  # int64 [owners] number of slots, 0 for a sum that is whole
    slots: int


def whole_items(rows: KeyRows, places: Places, copies: int) -> Items:
    """Every query that sees a row's first key, for b * groups copies of the rows."""
    begin = torch.searchsorted(places.position, rows.first)
    end = torch.searchsorted(places.start, rows.first, right=True)
    end = torch.where(rows.first < rows.end, end, begin)
    owner = torch.arange(copies * rows.first.shape[0], device=begin.device)
    slot = torch.full_like(owner, -1)
    query = torch.arange(places.start.shape[0], dtype=torch.int32, device=begin.device)
    return Items(query, owner, begin.repeat(copies), end.repeat(copies), slot)


def chosen_items(index: ReverseIndex, slot_bytes: int) -> tuple[Items, Pieces]:
    """Cut the lists so that no item has many times the average; slot_bytes: of a partial sum."""
    query, begin = index.queries, index.begin
    pairs, owners = query.shape[0], begin.shape[0] - 1
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
