"""Tiles of the Triton backend: a few neighbouring query tokens, all heads of a group, one program.

    slot    a token's place in its tile, 0 ... tokens - 1
    member  a block that at least one token of the tile selected, with a bit for each slot that did

A tile reads the union of its tokens' blocks once; a bit decides which rows see a block. Where
neighbours choose alike, as trained indices do, keys and values are read `tokens` times less often
than by one token at a time, and the matrix products are wide enough for the tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """How the rows of a tile are laid out: row = slot * heads + head; all powers of two."""

    tokens: int  # query tokens of a tile
    heads: int  # rows of a token, at least the heads of one part of its group
    parts: int  # a group with more heads than a tile takes is cut into parts
    r: int  # heads of a group


class Places(NamedTuple):
    """Where queries stand; key tokens, int64 [t], ascending, the same for every batch."""

    start: Tensor  # first key token of the query's sequence
    position: Tensor  # last key token that the query sees


class Members(NamedTuple):
    """What a tile reads: the union of its tokens' blocks, for [b, groups, tiles]."""

    first: Tensor  # int64 [b, groups, tiles, tokens * k] first key token of a block
    bits: Tensor  # int32, alike: which slots selected it
    count: Tensor  # int32 [b, groups, tiles]


def padded(width: int) -> int:
    """The width of a tile that holds `width`: a power of two, at least what tl.dot takes."""
    return max(16, triton.next_power_of_2(width))


def rows_for(t: int, r: int, wanted: int = 64) -> Rows:
    """About `wanted` rows a tile: several tokens of a small group, a part of a large one."""
    heads = min(triton.next_power_of_2(r), wanted)
    tokens = min(wanted // heads, triton.next_power_of_2(max(t, 1)), 16)
    heads_padded = max(heads, 16 // tokens)
    return Rows(tokens, heads_padded, triton.cdiv(r, heads_padded), r)


def places_of(t: int, s: int, cu_q: Tensor | None, cu_k: Tensor | None, device) -> Places:
    """Queries are the last t of the s keys of their sequence."""
    token = torch.arange(t, device=device)
    if cu_q is None:
        return Places(torch.zeros_like(token), token + (s - t))
    cu_q, cu_k = cu_q.long(), cu_k.long()
    owner = owner_of(cu_q[1:], t)
    return Places(cu_k[owner], token + (cu_k[1:] - cu_q[1:])[owner])


def owner_of(ends: Tensor, number: int) -> Tensor:
    """The sequence that place 0 ... number - 1 belongs to, from the places where sequences end."""
    places = torch.arange(number, device=ends.device)
    return torch.searchsorted(ends, places, right=True).clamp(max=max(ends.shape[0] - 1, 0))


def members_of(blocks: Tensor, block_size: int, places: Places, tokens: int) -> Members:
    """The union of the blocks of every tile; blocks [b, groups, t, k] in any order."""
    b, groups, t, k = blocks.shape
    tiles, size = triton.cdiv(t, tokens), tokens * k
    shape = (b, groups, tiles)
    first = torch.empty(*shape, size, dtype=torch.int64, device=blocks.device)
    bits = torch.empty(*shape, size, dtype=torch.int32, device=blocks.device)
    count = torch.empty(shape, dtype=torch.int32, device=blocks.device)
    if count.numel():
        width = triton.next_power_of_2(max(size, 1))
        unite[(count.numel(),)](
            blocks, places, Members(first, bits, count), blocks.stride(), groups, t, k,
            block_size, tokens, width, num_warps=max(1, min(4, width // 32)),
        )  # fmt: skip
    return Members(first, bits, count)


@triton.jit
def unite(
    blocks,
    places,
    members,
    strides,
    groups,
    t,
    k,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per tile: every block that its tokens selected and see, once, with its bits."""
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(t, TOKENS)
    place = tl.arange(0, WIDTH)
    token = tile % tiles * TOKENS + place // k
    there = (place < TOKENS * k) & (token < t)
    batch, group = tile // tiles // groups, tile // tiles % groups
    base = blocks + batch * strides[0] + group * strides[1]
    block = tl.load(base + token * strides[2] + place % k * strides[3], mask=there, other=-1)
    block = block.to(tl.int64)
    start = tl.load(places.start + token, mask=there, other=0)
    position = tl.load(places.position + token, mask=there, other=-1)
    there = there & (block >= 0) & (block <= (position - start) // BLOCK)
    first = tl.where(there, start + block * BLOCK, -1 - place)

    bits = tl.zeros([WIDTH], tl.int32)
    again = tl.zeros([WIDTH], tl.int1)
    for other in range(TOKENS * k):
        chosen = tl.sum(tl.where(place == other, first, 0))
        same = first == chosen
        bits |= tl.where(same, 1 << (other // k), 0)
        again = again | (same & (place > other))
    kept = there & ~again
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    base = tile * TOKENS * k
    tl.store(members.first + base + slot, first, mask=kept)
    tl.store(members.bits + base + slot, bits, mask=kept)
    tl.store(members.count + tile, tl.sum(kept.to(tl.int32)))
