"""Attention of tiles of queries over the keys that they read, backward.

    P = exp(X - lse);  dP = dout V;  dX = P (dP - sum of dout out) * scale
    dq = dX K;  dK = dX q;  dV = P dout

Two kernels, each of which owns what it writes, so that nothing is added in an order that changes:
dq belongs to a tile of queries, dK and dV to a block of keys with the list of its readers
(`openmsa.ops.triton_owners`). Both form P and dP; that costs 7 products instead of 5 and saves
either atomics or a partial dq for every query and block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmsa.ops.reverse_index import KeyRows
from openmsa.ops.triton_owners import Items, Pieces
from openmsa.ops.triton_rows import (
    Shape,
    Strides,
    edges,
    load_keys,
    load_rows,
    locate,
    not_finite,
    put,
    reads_of,
    rows_of,
    seen,
    side_by_side,
    span_of,
    step_of,
)
from openmsa.ops.triton_tiles import Members, Places

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def add_keys(
    query, slope, k, v, k_stride, v_stride, members, reads, lo, steps,
    slot, start, position, last, stat, delta, scale, S: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dq of a tile, before the scale; stat: lse in powers of two."""
    D: tl.constexpr = S.D
    N: tl.constexpr = 16 if CAREFUL else S.BN
    stages: tl.constexpr = 1 if CAREFUL else None
    acc = tl.zeros([query.shape[0], D], tl.float32)
    for i in tl.range(0, steps * (S.BN // N), num_stages=stages):
        first, mark, offset, bits = step_of(i, members, reads, lo, N, S)
        key = offset + tl.arange(0, N)
        size: tl.constexpr = S.BN if S.whole else S.block
        inside = key < tl.minimum(last + 1 - first, size)
        keys = load_keys(k + first * k_stride, k_stride, key, inside, S.d, S.D)
        values = load_keys(v + first * v_stride, v_stride, key, inside, S.dv, S.DV)
        if CAREFUL:
            spoilt = not_finite(keys) + not_finite(values)
            keys = tl.where((spoilt == 0)[:, None], keys, 0.0)
            values = tl.where((spoilt == 0)[:, None], values, 0.0)
        x = tl.dot(query, tl.trans(keys), input_precision=S.precision) * (scale * LOG2E)
        p = tl.exp2(x - stat[:, None])
        dp = tl.dot(slope, tl.trans(values), input_precision=S.precision)
        floor, edge = edges(mark, bits, slot, start, position, S)
        dx = tl.where(seen(key, floor, edge, S), p * (dp - delta[:, None]), 0.0)
        acc = tl.dot(dx.to(keys.dtype), keys, acc, input_precision=S.precision)
    return acc


@triton.jit
def tile_gradients(
    q, k, v, out, dout, lse, delta, dq, members, places, strides, batches, t, scale,
    S: tl.constexpr,
):  # fmt: skip
    """One program per tile: dq [b, t, h, d], and delta = sum of dout out, [b, t, h]."""
    tile, part, group, batch = locate(t, S)
    slot, token, head, there = rows_of(tile, part, group, t, S)
    start, position, lo, last = span_of(places, token, t, S)
    query = load_rows(q, strides.q, batch, token, head, there, S.d, S.D)
    row = (batch * t + token) * S.heads + head
    column = tl.arange(0, S.DV)
    values = there[:, None] & (column < S.dv)[None, :]
    at = row[:, None] * S.dv + column[None, :]
    slope = tl.load(dout + at, mask=values, other=0.0)
    result = tl.load(out + at, mask=values, other=0.0)
    sums = tl.sum(slope.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + row, sums, mask=there)
    stat = tl.load(lse + row, mask=there, other=0.0) * LOG2E

    kv_head = group * S.kv_heads // S.groups
    k += batch * strides.k[0] + kv_head * strides.k[2]
    v += batch * strides.v[0] + kv_head * strides.v[2]
    if S.whole:
        reads, steps = 0, tl.cdiv(last + 1 - lo, S.BN).to(tl.int32)
    else:
        number = (batch * S.groups + group) * tl.cdiv(t, S.rows.tokens) + tile
        reads = number * members.size
        steps = tl.load(members.count + number) * ((S.block + S.BN - 1) // S.BN)
    acc = add_keys(
        query, slope, k, v, strides.k[1], strides.v[1], members, reads, lo, steps,
        slot, start, position, last, stat, sums, scale, S, False,
    )  # fmt: skip
    probe = tl.sum(tl.sum(acc, 1), 0)
    if probe - probe != 0:
        acc = add_keys(
            query, slope, k, v, strides.k[1], strides.v[1], members, reads, lo, steps,
            slot, start, position, last, stat, sums, scale, S, True,
        )  # fmt: skip
    put(dq + row * S.d, acc * scale, there, S.d)


@triton.jit
def readers_of(i, end, part, group, items, t, S: tl.constexpr):
    """Rows of the next readers of an owner: token, head, and whether it is one."""
    row = tl.arange(0, S.rows.tokens * S.rows.heads)
    place = i + row // S.rows.heads
    head = part * S.rows.heads + row % S.rows.heads
    there = (place < end) & (head < S.rows.r)
    token = tl.load(items.query + place, mask=place < end, other=t).to(tl.int64)
    return token, group * S.rows.r + head, there & (token < t)


@triton.jit
def add_readers(
    q, dout, lse, delta, places, items, begin, end, keys, values, key, first, spoilt,
    strides, batch, part, group, t, scale, dk, dv, S: tl.constexpr,
):  # fmt: skip
    """dk (before the scale) and dv of a block, from the readers begin ... end - 1."""
    for i in range(begin, end, S.rows.tokens):
        token, head, there = readers_of(i, end, part, group, items, t, S)
        position = tl.load(places.position + token, mask=there, other=-1)
        edge = tl.minimum(tl.maximum(position - first, -1), S.block).to(tl.int32)
        query = load_rows(q, strides.q, batch, token, head, there, S.d, S.D)
        slope = load_rows(dout, strides.dout, batch, token, head, there, S.dv, S.DV)
        row = (batch * t + token) * S.heads + head
        stat = tl.load(lse + row, mask=there, other=0.0) * LOG2E
        sums = tl.load(delta + row, mask=there, other=0.0)
        visible = key[:, None] <= edge[None, :]
        x = tl.dot(keys, tl.trans(query), input_precision=S.precision) * (scale * LOG2E)
        p = tl.exp2(x - stat[None, :] + spoilt[:, None])
        p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(slope.dtype), slope, dv, input_precision=S.precision)
        dp = tl.dot(values, tl.trans(slope), input_precision=S.precision)
        dx = tl.where(visible, p * (dp - sums[None, :]), 0.0)
        dk = tl.dot(dx.to(query.dtype), query, dk, input_precision=S.precision)
    return dk, dv


@triton.jit
def owner_gradients(
    q, k, v, dout, lse, delta, dk, dv, parts, items, rows, places, strides, number, s, t, scale,
    S: tl.constexpr,
):  # fmt: skip
    """One program per item and BN keys: dk [b, s, groups, d], dv, or a part [slots, block, d + dv].

    number: how many rows there are.
    """
    BN: tl.constexpr = S.BN
    D: tl.constexpr = S.D
    DV: tl.constexpr = S.DV
    chunks: tl.constexpr = (S.block + S.BN - 1) // S.BN
    item = tl.program_id(0).to(tl.int64) // chunks
    slot = tl.load(items.slot + item)
    if slot == -2:
        return
    owner = tl.load(items.owner + item)
    begin, end = tl.load(items.begin + item), tl.load(items.end + item)
    copy, row = owner // number, owner % number
    batch, group = copy // S.groups, copy % S.groups
    kv_head = group * S.kv_heads // S.groups
    first = tl.load(rows.first + row)
    size = tl.load(rows.end + row) - first
    key = tl.program_id(0) % chunks * S.BN + tl.arange(0, S.BN)
    inside = key < size
    k += batch * strides.k[0] + kv_head * strides.k[2] + first * strides.k[1]
    v += batch * strides.v[0] + kv_head * strides.v[2] + first * strides.v[1]
    keys = load_keys(k, strides.k[1], key, inside, S.d, S.D)
    values = load_keys(v, strides.v[1], key, inside, S.dv, S.DV)
    spoilt = not_finite(keys) + not_finite(values)
    keys = tl.where((spoilt == 0)[:, None], keys, 0.0)
    values = tl.where((spoilt == 0)[:, None], values, 0.0)
    acc_k = tl.zeros([BN, D], tl.float32)
    acc_v = tl.zeros([BN, DV], tl.float32)
    PARTS: tl.constexpr = S.rows.parts
    for part in tl.static_range(PARTS):
        acc_k, acc_v = add_readers(
            q, dout, lse, delta, places, items, begin, end, keys, values, key, first, spoilt,
            strides, batch, part, group, t, scale, acc_k, acc_v, S,
        )  # fmt: skip
    wide: tl.constexpr = S.d + S.dv
    if slot >= 0:
        inside = key < S.block
        piece = parts + (slot * S.block + key) * wide
        put(piece, acc_k * scale, inside, S.d)
        put(piece + S.d, acc_v, inside, S.dv)
    else:
        at = (batch * s + first + key) * S.groups + group
        put(dk + at * S.d, acc_k * scale, inside, S.d)
        put(dv + at * S.dv, acc_v, inside, S.dv)


@triton.jit
def add_pieces(parts, pieces, rows, dk, dv, number, s, S: tl.constexpr):
    """One program per owner and 16 keys: the parts of a popular block, added in their order."""
    D: tl.constexpr = S.D
    DV: tl.constexpr = S.DV
    chunks: tl.constexpr = (S.block + 15) // 16
    owner = tl.program_id(0).to(tl.int64) // chunks
    count = tl.load(pieces.count + owner)
    if count == 0:
        return
    copy, row = owner // number, owner % number
    batch, group = copy // S.groups, copy % S.groups
    first = tl.load(rows.first + row)
    key = tl.program_id(0) % chunks * 16 + tl.arange(0, 16)
    inside = key < tl.load(rows.end + row) - first
    wide: tl.constexpr = S.d + S.dv
    column, column_v = tl.arange(0, S.D), tl.arange(0, S.DV)
    mask = inside[:, None] & (column < S.d)[None, :]
    mask_v = inside[:, None] & (column_v < S.dv)[None, :]
    acc = tl.zeros([16, D], tl.float32)
    acc_v = tl.zeros([16, DV], tl.float32)
    slot = tl.load(pieces.first + owner)
    for i in range(slot, slot + count):
        at = (parts + (i * S.block + key) * wide)[:, None]
        acc += tl.load(at + column[None, :], mask=mask, other=0.0)
        acc_v += tl.load(at + S.d + column_v[None, :], mask=mask_v, other=0.0)
    at = (batch * s + first + key) * S.groups + group
    put(dk + at * S.d, acc, inside, S.d)
    put(dv + at * S.dv, acc_v, inside, S.dv)


def query_gradients(
    dout: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    members: Members | None,
    places: Places,
    shape: Shape,
    scale: float,
    launch: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """dq [b, t, h, d] and delta [b, t, h]; out and dout contiguous."""
    q, k, v = side_by_side(q, k, v)
    b, t, h, d = q.shape
    dq, delta = q.new_empty(b, t, h, d), torch.empty_like(lse)
    grid = (triton.cdiv(t, shape.rows.tokens) * shape.rows.parts * shape.groups * b,)
    strides = Strides(q.stride()[:3], k.stride()[:3], v.stride()[:3], dout.stride()[:3])
    reads = reads_of(members, k.shape[1], shape, lse)
    if grid[0]:
        tile_gradients[grid](
            q, k, v, out, dout, lse, delta, dq, reads, places, strides, b, t, scale, shape, **launch
        )  # fmt: skip
    return dq, delta


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    items: Items,
    pieces: Pieces | None,
    rows: KeyRows,
    places: Places,
    shape: Shape,
    scale: float,
    launch: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """dk [b, s, kv_heads, d] and dv in the dtypes of k and v."""
    q, k, v = side_by_side(q, k, v)
    (b, s, kv_heads, d), dv_width, t = k.shape, shape.dv, q.shape[1]
    # More groups than KV heads: a sum for each, added below.
    sums = k.dtype if shape.groups == kv_heads else torch.float32
    dk = k.new_empty(b, s, shape.groups, d, dtype=sums)
    dv = k.new_empty(b, s, shape.groups, dv_width, dtype=sums)
    number, wide = rows.first.shape[0], d + dv_width
    parts = lse.new_empty((0 if pieces is None else pieces.slots) * shape.block * wide)
    strides = Strides(q.stride()[:3], k.stride()[:3], v.stride()[:3], dout.stride()[:3])
    chunks = triton.cdiv(shape.block, shape.BN)
    if dk.numel():
        owner_gradients[(items.slot.shape[0] * chunks,)](
            q, k, v, dout, lse, delta, dk, dv, parts, items, rows, places, strides,
            number, s, t, scale, shape, **launch,
        )  # fmt: skip
    if dk.numel() and parts.numel():
        add_pieces[(b * shape.groups * number * triton.cdiv(shape.block, 16),)](
            parts, pieces, rows, dk, dv, number, s, shape
        )
    if shape.groups != kv_heads:
        dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) for x in (dk, dv))
    return dk.to(k.dtype), dv.to(v.dtype)
