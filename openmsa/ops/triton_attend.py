"""Attention of tiles of queries over the keys that they read, forward.

    X = q K * scale;  out = softmax(X) V;  lse = log sum exp X

What a tile reads is the union of its tokens' selected blocks (`openmsa.ops.triton_tiles`) or, with
`whole`, every key up to its last query. Few queries: the reading is split, and the parts are joined
in a fixed order.

A key or value that is not finite must turn every query that reads it into NaN and no other one.
That is first computed as if all were finite; only a tile that met something else does it again,
looking at every key.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def read_keys(
    query, k, v, k_stride, v_stride, members, reads, lo, begin, end,
    slot, start, position, last, scale, S: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Steps begin ... end - 1: maximum and sum of the powers of two, weighted values, and the
    lowest score of a row, -inf where a key was. CAREFUL: in small pieces, to hold the check."""
    DV: tl.constexpr = S.DV
    N: tl.constexpr = 16 if CAREFUL else S.BN
    top = tl.full([query.shape[0]], float("-inf"), tl.float32)
    low = tl.zeros([query.shape[0]], tl.float32)
    total = tl.zeros([query.shape[0]], tl.float32)
    acc = tl.zeros([query.shape[0], DV], tl.float32)
    stages: tl.constexpr = 1 if CAREFUL else None
    for i in tl.range(begin * (S.BN // N), end * (S.BN // N), num_stages=stages):
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
        x = tl.dot(query, tl.trans(keys), input_precision=S.precision) * scale
        if CAREFUL:
            x += spoilt[None, :]
        else:
            low = tl.minimum(low, tl.min(x, 1))
        floor, edge = edges(mark, bits, slot, start, position, S)
        x = tl.where(seen(key, floor, edge, S), x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(top - shift)
        p = tl.exp2(x - shift[:, None])
        total = total * weight + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * weight[:, None], input_precision=S.precision)
        top = higher
    return top, total, acc, low


@triton.jit
def attend(q, k, v, out, lse, members, places, strides, batches, t, splits, scale, S: tl.constexpr):
    """One program per tile: out [splits, b, t, h, dv] and lse [splits, b, t, h] of what it reads.

    scale is that of powers of two.
    """
    tile, part, group, program = locate(t, S)
    batch, split = program % batches, program // batches
    slot, token, head, there = rows_of(tile, part, group, t, S)
    start, position, lo, last = span_of(places, token, t, S)
    query = load_rows(q, strides.q, batch, token, head, there, S.d, S.D)
    kv_head = group * S.kv_heads // S.groups
    k += batch * strides.k[0] + kv_head * strides.k[2]
    v += batch * strides.v[0] + kv_head * strides.v[2]

    tile_of_all = (batch * S.groups + group) * tl.cdiv(t, S.rows.tokens) + tile
    if S.whole:
        reads, steps = 0, tl.cdiv(last + 1 - lo, S.BN).to(tl.int32)
    else:
        reads = tile_of_all * members.size
        steps = tl.load(members.count + tile_of_all) * ((S.block + S.BN - 1) // S.BN)
    share = tl.cdiv(steps, splits)
    begin = (split * share).to(tl.int32)
    end = tl.minimum(steps, begin + share)
    top, total, acc, low = read_keys(
        query, k, v, strides.k[1], strides.v[1], members, reads, lo, begin, end,
        slot, start, position, last, scale, S, False,
    )  # fmt: skip
    probe = tl.sum(tl.sum(acc, 1) + total + low, 0)
    if probe - probe != 0:
        top, total, acc, low = read_keys(
            query, k, v, strides.k[1], strides.v[1], members, reads, lo, begin, end,
            slot, start, position, last, scale, S, True,
        )  # fmt: skip

    nothing = total == 0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    stat = tl.where(nothing, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    row = ((split * batches + batch) * t + token) * S.heads + head
    put(out + row * S.dv, acc, there, S.dv)
    tl.store(lse + row, stat, mask=there)


@triton.jit
def join(parts, stats, out, lse, rows, splits, d: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """One program per N rows: out [rows, d], lse [rows] from parts [splits, rows, d]."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    column = tl.arange(0, D)
    here = row < rows
    mask = here[:, None] & (column < d)[None, :]
    at = row[:, None] * d + column[None, :]
    top = tl.full([N], float("-inf"), tl.float32)
    for i in range(splits):
        stat = tl.load(stats + tl.cast(i, tl.int64) * rows + row, mask=here, other=float("-inf"))
        # A maximum may pass over NaN; a sum below does not.
        top = tl.maximum(top, stat)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([N], tl.float32)
    acc = tl.zeros([N, D], tl.float32)
    for i in range(splits):
        stat = tl.load(stats + tl.cast(i, tl.int64) * rows + row, mask=here, other=float("-inf"))
        part = tl.load(
            parts + (i * rows + row)[:, None] * d + column[None, :], mask=mask, other=0.0
        )
        weight = tl.exp(stat - shift)
        total += weight
        acc += part * weight[:, None]
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    stat = tl.where(total == 0, float("-inf"), shift + tl.log(total))
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + row, stat, mask=here)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    members: Members | None,
    places: Places,
    shape: Shape,
    scale: float,
    splits: int,
    launch: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """out [b, t, h, dv] in the dtype of q, lse [b, t, h]"""
    q, k, v = side_by_side(q, k, v)
    b, t, h, _ = q.shape
    out = q.new_empty(b, t, h, shape.dv)
    lse = q.new_empty(b, t, h, dtype=torch.float32)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    parts, stats = out, lse
    if splits > 1:
        parts = q.new_empty(splits, b, t, h, shape.dv, dtype=torch.float32)
        stats = q.new_empty(splits, b, t, h, dtype=torch.float32)
    tiles = triton.cdiv(t, shape.rows.tokens)
    grid = (tiles * shape.rows.parts * shape.groups * b * splits,)
    strides = Strides(q.stride()[:3], k.stride()[:3], v.stride()[:3])
    reads = reads_of(members, k.shape[1], shape, lse)
    scale = scale * math.log2(math.e)
    attend[grid](
        q, k, v, parts, stats, reads, places, strides, b, t, splits, scale, shape, **launch
    )
    if splits > 1:
        rows = b * t * h
        at_once = max(1, 2048 // shape.DV)
        join[(triton.cdiv(rows, at_once),)](
            parts, stats, out, lse, rows, splits, shape.dv, shape.DV, at_once
        )
    return out, lse
