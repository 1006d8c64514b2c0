"""Tiles: (query, block) pairs of a selection sorted by block, so that many queries read it once.

    row    one block of keys of one sequence; the rows of all sequences are numbered through
    pair   a query token (of one group) and a block that it selected
    tile   a row and up to `width` queries that selected it; empty places hold a filler

Pairs of one row become tiles, tiles become batched matrix products [w keys, r * width queries], and
every query finds the parts of its result again by number. No shape depends on the data except the
number of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openmsa.ops.workspace import rows_at_once


@dataclass(frozen=True)
class Rows:
    """Where blocks of keys lie and what queries may see; token numbers count along the key axis."""

    block_size: int
    count: int
    keys: int  # s
    batch: Tensor  # [rows]
    first: Tensor  # [rows] first key token
    row0: Tensor  # [b, t] first row of the query's sequence
    start: Tensor  # [b, t] first key token of the query's sequence
    position: Tensor  # [b, t] last key token that the query sees
    cu_seqlens_k: Tensor | None

    def key_slots(self) -> Tensor:
        """row * block_size + place in the row, for every key token: [b, s]."""
        key = torch.arange(self.keys, device=self.first.device)
        if self.cu_seqlens_k is None:
            n = -(-self.keys // self.block_size)
            batch = torch.arange(self.row0.shape[0], device=key.device)[:, None]
            return batch * n * self.block_size + key
        row0 = _row0(self.cu_seqlens_k, self.block_size)
        of_key = _owner(self.cu_seqlens_k[1:], self.keys)
        return (row0[of_key] * self.block_size + key - self.cu_seqlens_k[of_key])[None]


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
        keys=s,
        batch=batch.expand(b, n).flatten(),
        first=(torch.arange(n, device=device) * block_size).expand(b, n).flatten(),
        row0=zeros + batch * n,
        start=zeros,
        position=zeros + torch.arange(s - t, s, device=device),
        cu_seqlens_k=None,
    )


def _packed_rows(t: int, s: int, block_size: int, cu_q: Tensor, cu_k: Tensor) -> Rows:
    # A bound that needs no look at the lengths: every sequence has at most one short block.
    count = s // block_size + cu_q.shape[0] - 1
    row0 = _row0(cu_k, block_size)
    of_row, of_query = _owner(row0[1:], count), _owner(cu_q[1:], t)
    row = torch.arange(count, device=cu_q.device)
    return Rows(
        block_size=block_size,
        count=count,
        keys=s,
        batch=torch.zeros_like(row),
        first=cu_k[of_row] + (row - row0[of_row]) * block_size,
        row0=row0[of_query][None],
        start=cu_k[of_query][None],
        position=(cu_k[1:] - cu_q[1:])[of_query][None] + torch.arange(t, device=cu_q.device),
        cu_seqlens_k=cu_k,
    )


def _row0(cu_seqlens: Tensor, block_size: int) -> Tensor:
    """First row of every sequence, and one past the last: [sequences + 1]."""
    blocks = (cu_seqlens.diff() + block_size - 1) // block_size
    return torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])


def _owner(ends: Tensor, number: int) -> Tensor:
    """The sequence that place 0 ... number - 1 belongs to, from the places where sequences end."""
    places = torch.arange(number, device=ends.device)
    return torch.searchsorted(ends, places, right=True).clamp(max=ends.shape[0] - 1)


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
        """x [b, t, groups, r, d] -> the chunk's queries [C, r, d]."""
        return x[self.batches, self.tokens, self.groups].transpose(1, 2).flatten(0, 2)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write values [C, r, d] to where `of` takes them from."""
        values = values.unflatten(0, self.sizes).transpose(1, 2)
        x[self.batches, self.tokens, self.groups] = values.to(x.dtype)


def walk(
    blocks: Tensor, rows: Rows, r: int, pair_bytes: int, tile_bytes: int
) -> Iterator[tuple[Chunk, Tiles]]:
    """Cut blocks [b, groups, t, k] into chunks that fit the workspace, and every chunk into tiles.

    pair_bytes: what a pair needs for its r heads; tile_bytes: what a tile needs for its keys.
    """
    b, groups, t, k = blocks.shape
    if 0 in (b, groups, t, k, rows.keys):
        return
    n = -(-rows.keys // rows.block_size)
    at_once, width = 1, 1
    while True:
        # More queries make wider tiles, and wider tiles leave room for more queries.
        per_query = k * (pair_bytes + tile_bytes // width)
        at_once = rows_at_once(per_query, blocks.device, wanted=16 * n // k)
        wider = _width(min(t, at_once) * k // n, r)
        if wider <= width:
            break
        width = wider
    for chunk in chunks(b, groups, t, at_once):
        yield chunk, _cut(blocks, rows, chunk, r, _width(chunk.sizes[2] * k // n, r))


def chunks(b: int, groups: int, t: int, at_once: int) -> Iterator[Chunk]:
    """Chunks of at most `at_once` queries, made of whole sequences where these fit."""
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
    """Queries per tile: enough for an efficient product, few enough to fill most tiles."""
    width = 1
    while width * 2 <= pairs_per_block and width * r < 128:
        width *= 2
    return width


@dataclass(frozen=True)
class Tiles:
    """The pairs of one chunk: T tiles of `width` places, C queries of k slots, r heads each."""

    row: Tensor  # [T] row of keys
    group: Tensor  # [T] group, counted in the whole problem
    batch: Tensor  # [T]
    token: Tensor  # [T, w] key tokens, some beyond the end of the row's sequence
    position: Tensor  # [T, width] last key token that the query sees, -1 for a filler
    query: Tensor  # [T * r * width] (query, head) that stands there; from C * r on: filler
    place: Tensor  # [C, k, r] where in [T * r * width] a slot's results are; a filler's if empty

    def one_head(self) -> Tiles:
        """The same tiles for something that a group has one of."""
        r = self.place.shape[2]
        place, width = self.place[..., :1], self.position.shape[1]
        query = self.query.view(-1, r, width)[:, 0] // r
        return replace(
            self,
            query=query.flatten(),
            place=place // (r * width) * width + place % width,
        )

    def spread(self, x: Tensor) -> Tensor:
        """x [C, r, d] -> [T, r * width, d]: what belongs to the queries of every tile."""
        x = torch.cat([x.flatten(0, 1), x.new_zeros(x.shape[1:])])
        return x.index_select(0, self.query).view(len(self.row), -1, x.shape[1])

    def collect(self, x: Tensor) -> Tensor:
        """x [T, r * width, d] -> [C, k, r, d]: what the tiles hold for every query."""
        x = x.flatten(0, 1)
        return x.index_select(0, self.place.flatten()).view(*self.place.shape, x.shape[1])


def _cut(blocks: Tensor, rows: Rows, chunk: Chunk, r: int, width: int) -> Tiles:
    """Sort the pairs of `chunk` by row and cut them into tiles; blocks [b, groups, t, k]."""
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
    place = torch.empty_like(pair).index_copy_(0, pair, place).view(queries, k, 1)
    head = torch.arange(r, device=key.device)
    return Tiles(
        row=row,
        group=key_of_tile // rows.count + chunk.groups.start,
        batch=rows.batch[row],
        token=rows.first[row][:, None] + torch.arange(rows.block_size, device=key.device),
        position=seen[query_at].view(tiles, width),
        query=(query_at.view(tiles, 1, width) * r + head[:, None]).flatten(),
        place=place // width * (r * width) + head * width + place % width,
    )


def _count(last_tile: Tensor, bound: int) -> int:
    """The number of tiles; a bound where reading the number would stall the device."""
    return int(last_tile[-1]) if last_tile.device.type == "cpu" else bound
