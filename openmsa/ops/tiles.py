"""Tiles: (query, block) pairs of a selection sorted by block, so that many queries read it once.

    row    one block of keys of one sequence; the rows of all sequences are numbered through
    pair   a query token (of one group) and a block that it selected
    tile   a row and up to `width` queries that selected it; empty places hold a filler

Pairs of one row become tiles, tiles become batched matrix products [w keys, r * width queries], and
every query finds the parts of its result again by number. No shape depends on the data except the
number of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.ops.workspace import accumulate_dtype, rows_at_once


@dataclass(frozen=True)
class Rows:
    """Where blocks of keys lie and what queries may see; token numbers count along the key axis."""

    block_size: int
    count: int
    batch: Tensor  # [rows]
    first: Tensor  # [rows] first key token
    row0: Tensor  # [b, t] first row of the query's sequence
    start: Tensor  # [b, t] first key token of the query's sequence
    position: Tensor  # [b, t] last key token that the query sees
    key_slot: Tensor  # [b, s] row * block_size + place in the row, for every key token


def rows_of(
    shape: tuple[int, int, int],
    block_size: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
) -> Rows:
    """Number the blocks of b sequences of s keys and t queries, or of packed sequences."""
    b, t, s = shape
    if cu_seqlens_q is not None:
        return _packed_rows(t, s, block_size, cu_seqlens_q.long(), cu_seqlens_k.long())
    n = -(-s // block_size)
    batch = torch.arange(b, device=device)[:, None]
    zeros = torch.zeros(b, t, dtype=torch.long, device=device)
    return Rows(
        block_size=block_size,
        count=b * n,
        batch=batch.expand(b, n).flatten(),
        first=(torch.arange(n, device=device) * block_size).expand(b, n).flatten(),
        row0=zeros + batch * n,
        start=zeros,
        position=zeros + torch.arange(s - t, s, device=device),
        key_slot=batch * n * block_size + torch.arange(s, device=device),
    )


def _packed_rows(t: int, s: int, block_size: int, cu_q: Tensor, cu_k: Tensor) -> Rows:
    sequences = cu_q.shape[0] - 1
    # A bound that needs no look at the lengths: every sequence has at most one short block.
    count = s // block_size + sequences
    blocks = (cu_k.diff() + block_size - 1) // block_size
    last_row = blocks.cumsum(0)
    row0 = last_row - blocks

    def owner(borders: Tensor, number: int) -> Tensor:
        places = torch.arange(number, device=borders.device)
        return torch.searchsorted(borders, places, right=True).clamp(max=sequences - 1)

    of_row, of_query, of_key = owner(last_row, count), owner(cu_q[1:], t), owner(cu_k[1:], s)
    row = torch.arange(count, device=cu_q.device)
    query = torch.arange(t, device=cu_q.device)
    key = torch.arange(s, device=cu_q.device)
    return Rows(
        block_size=block_size,
        count=count,
        batch=torch.zeros_like(row),
        first=cu_k[of_row] + (row - row0[of_row]) * block_size,
        row0=row0[of_query][None],
        start=cu_k[of_query][None],
        position=(cu_k[of_query + 1] - cu_q[of_query + 1] + query)[None],
        key_slot=(row0[of_key] * block_size + key - cu_k[of_key])[None],
    )


@dataclass(frozen=True)
class Chunk:
    """The part of the work done at once: some sequences, some groups, some query tokens."""

    batches: slice
    groups: slice
    tokens: slice

    @property
    def sizes(self) -> tuple[int, int, int]:
        return tuple(x.stop - x.start for x in (self.batches, self.groups, self.tokens))

    def of(self, x: Tensor) -> Tensor:
        """x [b, t, groups, ...] -> its part [batches, tokens, groups, ...], a view."""
        return x[self.batches, self.tokens, self.groups]


def walk(blocks: Tensor, rows: Rows, r: int, bytes_per_pair: int) -> Iterator[tuple[Chunk, Tiles]]:
    """Cut blocks [b, groups, t, k] into chunks that fit the workspace, and every chunk into
    tiles."""
    b, groups, t, k = blocks.shape
    s = rows.key_slot.shape[1]
    if 0 in (b, groups, t, k, s):
        return
    n = -(-s // rows.block_size)
    at_once = rows_at_once(bytes_per_pair * k, blocks.device, wanted=16 * n // k)
    for chunk in _chunks(b, groups, t, at_once):
        yield chunk, cut(blocks, rows, chunk, _width(chunk.sizes[2] * k // n, r))


def _chunks(b: int, groups: int, t: int, at_once: int) -> Iterator[Chunk]:
    """Chunks of at most `at_once` queries; whole sequences and several of them together where they
    fit."""
    tokens = max(1, min(t, at_once))
    num_groups = max(1, min(groups, at_once // tokens))
    batches = max(1, min(b, at_once // (tokens * num_groups)))
    for b0 in range(0, b, batches):
        for g0 in range(0, groups, num_groups):
            for t0 in range(0, t, tokens):
                yield Chunk(
                    slice(b0, min(b, b0 + batches)),
                    slice(g0, min(groups, g0 + num_groups)),
                    slice(t0, min(t, t0 + tokens)),
                )


def _width(pairs_per_block: int, r: int) -> int:
    """Queries per tile: enough for an efficient matrix product, few enough that tiles are mostly
    full."""
    width = 1
    while width * 4 <= pairs_per_block and width * r < 128:
        width *= 2
    return width


@dataclass(frozen=True)
class Tiles:
    """The pairs of one chunk; T tiles of `width` places, C queries of k slots."""

    row: Tensor  # [T] row of keys
    group: Tensor  # [T] group, counted in the whole problem
    batch: Tensor  # [T]
    token: Tensor  # [T, w] key tokens, some beyond the end of the row's sequence
    query: Tensor  # [T, width] query, counted in the chunk; C is the filler
    position: Tensor  # [T, width] last key token that the query sees, -1 for the filler
    place: Tensor  # [C, k] tile * width + place; empty slots point at a filler


def cut(blocks: Tensor, rows: Rows, chunk: Chunk, width: int) -> Tiles:
    """Sort the pairs of `chunk` by row and cut them into tiles. blocks int32 [b, G, t, k], any
    order within k."""
    blocks = blocks[chunk.batches, chunk.groups, chunk.tokens].long()
    position, start, row0 = (
        x[chunk.batches, None, chunk.tokens] for x in (rows.position, rows.start, rows.row0)
    )
    own = (position - start) // rows.block_size
    groups, k = blocks.shape[1], blocks.shape[3]
    queries = blocks[..., 0].numel()
    keys = groups * rows.count
    group = torch.arange(groups, device=blocks.device)[:, None, None]
    visible = (blocks >= 0) & (blocks <= own[..., None])
    key = torch.where(visible, group * rows.count + row0[..., None] + blocks, keys)

    key, pair = key.flatten().sort(stable=True)
    begin = torch.searchsorted(key, torch.arange(keys + 1, device=key.device))
    tiles_of_key = (begin.diff() + width - 1) // width
    last_tile = tiles_of_key.cumsum(0)
    # One tile more than needed: it holds only fillers, and empty slots point there.
    tiles = 1 + _count(last_tile, min(key.numel(), key.numel() // width + keys))
    nowhere = (tiles - 1) * width
    query = pair // k
    # The sort is stable, so a block named twice by one query stands beside itself.
    again = torch.zeros_like(key, dtype=torch.bool)
    again[1:] = (key[1:] == key[:-1]) & (query[1:] == query[:-1])
    unused = again | (key == keys)
    first = (last_tile - tiles_of_key) * width - begin[:-1]
    place = torch.arange(key.numel(), device=key.device) + first[key.clamp(max=keys - 1)]
    place = torch.where(unused, nowhere, place)

    query_at = torch.full((tiles * width,), queries, device=key.device)
    query_at[place] = torch.where(unused, queries, query)
    key_of_tile = torch.searchsorted(
        last_tile, torch.arange(tiles, device=key.device), right=True
    ).clamp(max=keys - 1)
    row = key_of_tile % rows.count
    seen = torch.cat([position.expand(blocks.shape[:3]).flatten(), position.new_full((1,), -1)])
    return Tiles(
        row=row,
        group=key_of_tile // rows.count + chunk.groups.start,
        batch=rows.batch[row],
        token=rows.first[row][:, None] + torch.arange(rows.block_size, device=key.device),
        query=query_at.view(tiles, width),
        position=seen[query_at].view(tiles, width),
        place=torch.empty_like(pair).index_copy_(0, pair, place).view(queries, k),
    )


def _count(last_tile: Tensor, bound: int) -> int:
    """The number of tiles: exact where reading is free, else a bound, because reading would stall
    the device."""
    return int(last_tile[-1]) if last_tile.device.type == "cpu" else bound


def keys_of(x: Tensor, tiles: Tiles, groups: int, dtype: torch.dtype) -> Tensor:
    """x [b, s, g, d] -> [T, w, d]: the tokens of every tile's row, for its group's KV head."""
    token = tiles.token.clamp(max=x.shape[1] - 1)
    head = tiles.group * x.shape[2] // groups
    return x[tiles.batch[:, None], token, head[:, None]].to(dtype)


def scores(q: Tensor, keys: Tensor, tile: Tiles, scale: float, spoilt: Tensor) -> Tensor:
    """q [T, r * width, d], keys [T, w, d] -> [T, w, r * width]: scaled, -inf where unseen, NaN
    where spoilt.

    Keys come first because maxima and sums over keys then run along rows.
    """
    x = torch.bmm(keys, q.mT).to(accumulate_dtype(q)).mul_(scale)
    seen = torch.where(spoilt, math.nan, 0.0).to(x.dtype)[:, :, None]
    bias = torch.where(tile.token[:, :, None] > tile.position[:, None], -math.inf, seen)
    x.unflatten(2, (-1, bias.shape[2])).add_(bias[:, :, None])
    return x


def clean(*keys: Tensor) -> tuple[Tensor, ...]:
    """keys [T, w, d] ... -> which tokens are not finite [T, w], and keys with those zeroed.

    A weight of 0 times NaN is NaN, so without this a query would be spoilt by keys that it does not
    see.
    """
    spoilt = ~sum(x.sum(-1, dtype=accumulate_dtype(x)) for x in keys).isfinite()
    if spoilt.device.type != "cpu" or spoilt.any():
        keys = tuple(x.masked_fill(spoilt[..., None], 0) for x in keys)
    return spoilt, *keys


def combine(top: Tensor, total: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and sums of exponentials per place -> log-sum-exp per query [C, r], weight of each
    part [C, k, r]."""
    top, total = top.flatten()[at], total.flatten()[at]
    best = top.amax(1, keepdim=True)
    weight = (top - best).exp_()
    total = (total * weight).sum(1)
    weight = weight / torch.where(total == 0, 1, total)[:, None]
    return best[:, 0] + total.log(), weight


def with_filler(x: Tensor, dtype: torch.dtype, fill: float = 0) -> Tensor:
    """x [batches, tokens, groups, r, d] of a chunk -> [(C + 1) * r, d]: its queries, then the
    filler."""
    x = x.transpose(1, 2).to(dtype)
    r, d = x.shape[3], x.shape[4]
    return torch.cat([x.reshape(-1, d), x.new_full((r, d), fill)])


def heads_at(query: Tensor, r: int) -> Tensor:
    """query [T, width] -> [T * r * width]: rows of `with_filler` that fill the tiles, head by
    head."""
    head = torch.arange(r, device=query.device)[:, None]
    return (query[:, None] * r + head).flatten()


def results_at(place: Tensor, r: int, width: int) -> Tensor:
    """place [C, k] -> [C, k, r]: where in [T, r, width] a query finds the results of its pairs."""
    head = torch.arange(r, device=place.device) * width
    return (place // width * (r * width) + place % width)[..., None] + head


def by_query(x: Tensor, chunk: Chunk) -> Tensor:
    """[C, r, ...] -> [batches, tokens, groups, r, ...]"""
    return x.unflatten(0, chunk.sizes).transpose(1, 2)


def by_token(sums: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """Sums per row of keys [g * rows, w * d] -> gradient of `like` [b, s, g, d], in its dtype."""
    sums = sums.view(like.shape[2], rows.count * rows.block_size, -1)
    return sums[:, rows.key_slot].permute(1, 2, 0, 3).to(like.dtype).contiguous()
