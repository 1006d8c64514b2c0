"""What the kernels of attention and of the index loss share: their shape, and rows, keys, edges.

Rows are query tokens times heads of a tile; keys are read `BN` at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmsa.ops.triton_tiles import Members, Rows, padded


class Shape(NamedTuple):
    """What a kernel is compiled for. Capitals: padded to what a tile holds."""

    rows: Rows
    heads: int  # query heads, h
    groups: int  # groups of the selection, or of the keys if these are more
    kv_heads: int
    d: int
    dv: int
    D: int
    DV: int
    block: int  # keys of a block
    BN: int  # keys at once
    whole: bool  # the whole prefix instead of members
    precision: str  # how tl.dot multiplies fp32


@triton.jit
def locate(t, S: tl.constexpr):
    """Split, batch, group, part and tile of a program; tiles run fastest, they share keys."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(t, S.rows.tokens)
    tile, program = program % tiles, program // tiles
    part, program = program % S.rows.parts, program // S.rows.parts
    group, program = program % S.groups, program // S.groups
    return tile, part, group, program


@triton.jit
def rows_of(tile, part, group, t, S: tl.constexpr):
    """Of every row: slot, token, head, and whether it is one."""
    row = tl.arange(0, S.rows.tokens * S.rows.heads)
    slot = row // S.rows.heads
    token = tile * S.rows.tokens + slot
    head = part * S.rows.heads + row % S.rows.heads
    there = (token < t) & (head < S.rows.r)
    return slot, token, group * S.rows.r + head, there


@triton.jit
def load_rows(x, strides, batch, token, head, there, d: tl.constexpr, D: tl.constexpr):
    """x [b, t, h, d] -> [rows, D]"""
    column = tl.arange(0, D)
    offset = batch * strides[0] + token * strides[1] + head * strides[2]
    return tl.load(
        x + offset[:, None] + column[None, :],
        mask=there[:, None] & (column < d)[None, :],
        other=0.0,
    )


@triton.jit
def load_keys(x, stride, key, inside, d: tl.constexpr, D: tl.constexpr):
    """Keys or values of one head, from x on -> [N, D]; the stride fits offsets of 32 bits."""
    column = tl.arange(0, D)
    return tl.load(
        x + (key[:, None] * stride + column[None, :]),
        mask=inside[:, None] & (column < d)[None, :],
        other=0.0,
    )


@triton.jit
def put(at, x, inside, d: tl.constexpr):
    """Rows x [n, D] to where the pointers `at` [n] begin."""
    column = tl.arange(0, x.shape[1])
    mask = inside[:, None] & (column < d)[None, :]
    tl.store(at[:, None] + column[None, :], x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def step_of(i, members, reads, lo, N: tl.constexpr, S: tl.constexpr):
    """Step i of a tile: its first key token, the same as rows count it, the offset in its block,
    the slots that see it. Of a whole prefix rows count from `lo` on.

    A tile has at most 16 slots, so bits >> 16 is 0; but a compiler that knew would keep the place
    of every number of a step in registers from one step to the next.
    """
    if S.whole:
        step, chunk = i // (S.BN // N), i % (S.BN // N)
        mark = tl.load(members.first + step)
        first = lo + mark
        bits = tl.load(members.bits + step)
        mark += chunk * N
        first += chunk * N
        offset = bits >> 16
    else:
        chunks: tl.constexpr = (S.block + S.BN - 1) // S.BN * (S.BN // N)
        first = tl.load(members.first + reads + i // chunks)
        bits = tl.load(members.bits + reads + i // chunks)
        offset = i % chunks * N + (bits >> 16)
        mark = first
    return first, mark, offset, bits


@triton.jit
def span_of(places, token, t, S: tl.constexpr):
    """Of every row: what it sees, start ... position; then the first and the last key token."""
    start = tl.load(places.start + token, mask=token < t, other=1 << 62)
    position = tl.load(places.position + token, mask=token < t, other=-1)
    lo, last = tl.min(start, 0), tl.max(position, 0)
    if S.whole:
        start, position = start - lo, position - lo
    return start, position, lo, last


@triton.jit
def edges(mark, bits, slot, start, position, S: tl.constexpr):
    """The keys that a row sees, counted from `mark`: above the floor, up to the edge."""
    size: tl.constexpr = S.BN if S.whole else S.block
    edge = tl.minimum(tl.maximum(position - mark, -1), size - 1).to(tl.int32)
    edge = tl.where(((bits >> slot) & 1) != 0, edge, -1)
    floor = tl.minimum(tl.maximum(start - mark, 0), size).to(tl.int32)
    return floor, edge


@triton.jit
def seen(key, floor, edge, S: tl.constexpr):
    """[rows, N]; a member begins inside the row's sequence, so only `whole` has a floor."""
    visible = key[None, :] <= edge[:, None]
    if S.whole:
        visible = visible & (key[None, :] >= floor[:, None])
    return visible


@triton.jit
def not_finite(x):
    """Which rows of [n, d] hold something that is not finite, as 0 or NaN [n]."""
    x = x.to(tl.float32)
    return tl.sum(tl.where(x - x == 0, 0.0, float("nan")), 1)


class Strides(NamedTuple):
    """Of batch, token and head; channels lie side by side."""

    q: tuple[int, int, int]
    k: tuple[int, int, int]
    v: tuple[int, int, int]
    dout: tuple[int, int, int] = (0, 0, 0)


class Reads(NamedTuple):
    """Members as a kernel takes them."""

    first: Tensor
    bits: Tensor
    count: Tensor
    size: int  # places of a tile


def reads_of(members: Members | None, s: int, shape: Shape, like: Tensor) -> Reads:
    """members None: the whole prefix, and where its steps begin."""
    if members is None:
        first = torch.arange(0, s + shape.BN, shape.BN, device=like.device)
        bits = torch.full(first.shape, (1 << 16) - 1, dtype=torch.int32, device=like.device)
        return Reads(first, bits, bits, 0)
    return Reads(*members, members.first.shape[-1])


def side_by_side(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Channels side by side, and tokens so near that a block's offsets fit 32 bits."""
    return tuple(
        x if x.stride(-1) == 1 and x.stride(1) < 1 << 22 else x.contiguous() for x in tensors
    )


def keys_at_once(keys: int, block: int | None) -> int:
    """At most `keys`, and no more than a block; half of one whose size is no power of two, which
    wastes as little and needs fewer registers for its masks."""
    if block is None:
        return keys
    wide = padded(block)
    return min(keys, wide if wide == block else max(16, wide // 2))


def shape_of(
    q: Tensor,
    k: Tensor,
    dv: int,
    rows: Rows,
    groups: int,
    block: int | None,
    keys: int,
    precision: str = "ieee",
) -> Shape:
    """block None: the whole prefix. keys: at once, at most. precision: of fp32 products."""
    d = q.shape[3]
    at_once = keys_at_once(keys, block)
    return Shape(
        rows=rows,
        heads=q.shape[2],
        groups=groups,
        kv_heads=k.shape[2],
        d=d,
        dv=dv,
        D=padded(d),
        DV=padded(dv),
        block=at_once if block is None else block,
        BN=at_once,
        whole=block is None,
        precision=precision,
    )
