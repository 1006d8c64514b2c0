"""The kernels of the index loss: a program owns a tile of queries, or a block of keys.

    P   = mean over the group's heads of exp(X - lse)     teacher, X = q K * scale
    P'  = exp(Y - lse')                                   student, Y = q_index K_index * index_scale
    KL  = sum of P (log P - log P');    dY = w (P' - P)
    dq_index = dY K_index;              dK_index = dY q_index

A student has one row where its teacher has as many as the group has heads. A product needs 16 rows,
so a tile of fewer tokens spreads them out among rows of zeros and adds these up again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openmsa.ops.triton_rows import (
    edges,
    load_keys,
    load_rows,
    not_finite,
    put,
    rows_of,
    seen,
    span_of,
    step_of,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def spread_tokens(S: tl.constexpr):
    """Of every row of the student's product: its slot, and whether it is the slot's own row."""
    SUB: tl.constexpr = max(16 // S.rows.tokens, 1)
    row = tl.arange(0, S.rows.tokens * SUB)
    return row // SUB, row % SUB == 0


@triton.jit
def student(query_index, keys_index, index_scale, S: tl.constexpr):
    """Y in powers of two, [tokens, N]"""
    TOKENS: tl.constexpr = S.rows.tokens
    SUB: tl.constexpr = max(16 // S.rows.tokens, 1)
    y = tl.dot(query_index, tl.trans(keys_index), input_precision=S.precision)
    y = tl.sum(tl.reshape(y, [TOKENS, SUB, y.shape[1]]), 1)
    return y * (index_scale * LOG2E)


@triton.jit
def teacher(query, stat, keys, scale, S: tl.constexpr):
    """Sum over a part's heads of exp(X - lse), [tokens, N]; stat [rows]: lse in powers of two."""
    TOKENS: tl.constexpr = S.rows.tokens
    HEADS: tl.constexpr = S.rows.heads
    x = tl.dot(query, tl.trans(keys), input_precision=S.precision) * (scale * LOG2E)
    p = tl.exp2(x - stat[:, None])
    return tl.sum(tl.reshape(p, [TOKENS, HEADS, p.shape[1]]), 1)


@triton.jit
def as_rows(x, S: tl.constexpr):
    """[tokens, N] -> the rows of the student's product; each token's are alike."""
    TOKENS: tl.constexpr = S.rows.tokens
    SUB: tl.constexpr = max(16 // S.rows.tokens, 1)
    x = tl.broadcast_to(x[:, None, :], [TOKENS, SUB, x.shape[1]])
    return tl.reshape(x, [TOKENS * SUB, x.shape[2]])


@triton.jit
def whole_of_student(
    query_index, k_index, stride, members, reads, lo, begin, steps, slot, start, position, last,
    index_scale, S: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """lse' in powers of two [tokens], and the lowest score, -inf where a key was."""
    TOKENS: tl.constexpr = S.rows.tokens
    N: tl.constexpr = 16 if CAREFUL else S.BN
    stages: tl.constexpr = 1 if CAREFUL else None
    top = tl.full([TOKENS], float("-inf"), tl.float32)
    low = tl.zeros([TOKENS], tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    for i in tl.range(begin, steps * (S.BN // N), num_stages=stages):
        first, mark, offset, bits = step_of(i, members, reads, lo, N, S)
        key = offset + tl.arange(0, N)
        size: tl.constexpr = S.BN if S.whole else S.block
        inside = key < tl.minimum(last + 1 - first, size)
        keys = load_keys(k_index + first * stride, stride, key, inside, S.dv, S.DV)
        if CAREFUL:
            spoilt = not_finite(keys)
            keys = tl.where((spoilt == 0)[:, None], keys, 0.0)
        y = student(query_index, keys, index_scale, S)
        if CAREFUL:
            y += spoilt[None, :]
        low = tl.minimum(low, tl.min(y, 1))
        floor, edge = edges(mark, bits, slot, start, position, S)
        y = tl.where(seen(key, floor, edge, S), y, float("-inf"))
        higher = tl.maximum(top, tl.max(y, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(y - shift[:, None]), 1)
        top = higher
    stat = tl.where(total == 0, 0.0, top + tl.log2(total))
    return stat, low


@triton.jit
def compare(
    q, lse, query, stat, query_index, student_stat, weight, k, k_index, k_stride, index_stride,
    members, reads, lo, steps, slot, start, position, last, strides, batch, tile, group, t,
    scale, index_scale, S: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """KL of every token [tokens], and dq_index [student's rows, DI] before its scale."""
    DV: tl.constexpr = S.DV
    TOKENS: tl.constexpr = S.rows.tokens
    N: tl.constexpr = 16 if CAREFUL else S.BN
    stages: tl.constexpr = 1 if CAREFUL else None
    kl = tl.zeros([TOKENS], tl.float32)
    acc = tl.zeros([query_index.shape[0], DV], tl.float32)
    for i in tl.range(0, steps * (S.BN // N), num_stages=stages):
        first, mark, offset, bits = step_of(i, members, reads, lo, N, S)
        key = offset + tl.arange(0, N)
        size: tl.constexpr = S.BN if S.whole else S.block
        inside = key < tl.minimum(last + 1 - first, size)
        keys = load_keys(k + first * k_stride, k_stride, key, inside, S.d, S.D)
        at_index = k_index + first * index_stride
        keys_index = load_keys(at_index, index_stride, key, inside, S.dv, S.DV)
        if CAREFUL:
            spoilt = not_finite(keys_index)
            keys_index = tl.where((spoilt == 0)[:, None], keys_index, 0.0)
        p = teacher(query, stat, keys, scale, S)
        PARTS: tl.constexpr = S.rows.parts
        for part in tl.static_range(1, PARTS):
            more, more_stat = part_of(q, lse, strides, batch, tile, part, group, t, S)
            p += teacher(more, more_stat, keys, scale, S)
        y = student(query_index, keys_index, index_scale, S) - student_stat[:, None]
        if CAREFUL:
            y += spoilt[None, :]
        floor, edge = edges(mark, bits, slot, start, position, S)
        visible, p = seen(key, floor, edge, S), p / S.rows.r
        # Where a weight is 0 its logarithm is -inf, and 0 * -inf would be NaN.
        gap = p * (tl.log2(tl.maximum(p, 1.2e-38)) - y) * LN2
        kl += tl.sum(tl.where(visible, gap, 0.0), 1)
        dy = tl.where(visible, (tl.exp2(y) - p) * weight[:, None], 0.0)
        dy = as_rows(dy, S).to(keys_index.dtype)
        acc = tl.dot(dy, keys_index, acc, input_precision=S.precision)
    return kl, acc


@triton.jit
def part_of(q, lse, strides, batch, tile, part, group, t, S: tl.constexpr):
    """Queries of a part of the group, and their lse in powers of two; that of no head: inf."""
    _, token, head, there = rows_of(tile, part, group, t, S)
    query = load_rows(q, strides.q, batch, token, head, there, S.d, S.D)
    row = (batch * t + token) * S.heads + head
    return query, tl.load(lse + row, mask=there, other=float("inf")) * LOG2E


@triton.jit
def tile_loss(
    q, k, q_index, k_index, lse, weights, kl, student_lse, dq, members, places, strides,
    batches, t, scale, index_scale, S: tl.constexpr,
):  # fmt: skip
    """One program per tile: kl and lse' [b, t, g], dq [b, t, g, d_index] in fp32, not scaled."""
    tiles = tl.cdiv(t, S.rows.tokens)
    program = tl.program_id(0).to(tl.int64)
    tile, group, batch = program % tiles, program // tiles % S.groups, program // tiles // S.groups
    slot = tl.arange(0, S.rows.tokens)
    token = tile * S.rows.tokens + slot
    start, position, lo, last = span_of(places, token, t, S)
    weight = tl.load(weights + batch * t + token, mask=token < t, other=0.0)
    query, stat = part_of(q, lse, strides, batch, tile, 0, group, t, S)
    row_slot, own = spread_tokens(S)
    row_token = tile * S.rows.tokens + row_slot
    own = own & (row_token < t)
    zero = tl.zeros_like(row_token)
    index = load_rows(q_index, strides.dout, batch, row_token, zero + group, own, S.dv, S.DV)
    k += batch * strides.k[0] + group * strides.k[2]
    k_index += batch * strides.v[0]
    if S.whole:
        reads, steps = 0, tl.cdiv(last + 1 - lo, S.BN).to(tl.int32)
    else:
        reads = program * members.size
        steps = tl.load(members.count + program) * ((S.block + S.BN - 1) // S.BN)
    first_step = tl.zeros_like(steps)
    found, low = whole_of_student(
        index, k_index, strides.v[1], members, reads, lo, first_step, steps, slot, start,
        position, last, index_scale, S, False,
    )  # fmt: skip
    sums, acc = compare(
        q, lse, query, stat, index, found, weight, k, k_index, strides.k[1], strides.v[1],
        members, reads, lo, steps, slot, start, position, last, strides, batch, tile, group, t,
        scale, index_scale, S, False,
    )  # fmt: skip
    probe = tl.sum(tl.sum(acc, 1), 0) + tl.sum(found + low + sums, 0)
    if probe - probe != 0:
        found, low = whole_of_student(
            index, k_index, strides.v[1], members, reads, lo, first_step, steps, slot, start,
            position, last, index_scale, S, True,
        )  # fmt: skip
        sums, acc = compare(
            q, lse, query, stat, index, found, weight, k, k_index, strides.k[1], strides.v[1],
            members, reads, lo, steps, slot, start, position, last, strides, batch, tile, group,
            t, scale, index_scale, S, True,
        )  # fmt: skip
    at = (batch * t + token) * S.groups + group
    tl.store(kl + at, sums, mask=token < t)
    tl.store(student_lse + at, found, mask=token < t)
    put(dq + ((batch * t + row_token) * S.groups + group) * S.dv, acc, own, S.dv)


@triton.jit
def owner_loss(
    q, k, q_index, k_index, lse, weights, student_lse, dk, parts, items, rows, places, strides,
    number, s, t, scale, index_scale, S: tl.constexpr,
):  # fmt: skip
    """One program per item and BN keys: dk [b, s, groups, d_index] in fp32, or a part of it."""
    DV: tl.constexpr = S.DV
    BN: tl.constexpr = S.BN
    chunks: tl.constexpr = (S.block + S.BN - 1) // S.BN
    item = tl.program_id(0).to(tl.int64) // chunks
    slot = tl.load(items.slot + item)
    if slot == -2:
        return
    owner = tl.load(items.owner + item)
    begin, end = tl.load(items.begin + item), tl.load(items.end + item)
    copy, row = owner // number, owner % number
    batch, group = copy // S.groups, copy % S.groups
    first = tl.load(rows.first + row)
    size = tl.load(rows.end + row) - first
    key = tl.program_id(0) % chunks * S.BN + tl.arange(0, S.BN)
    inside = key < size
    k += batch * strides.k[0] + group * strides.k[2] + first * strides.k[1]
    k_index += batch * strides.v[0] + first * strides.v[1]
    keys = load_keys(k, strides.k[1], key, inside, S.d, S.D)
    keys_index = load_keys(k_index, strides.v[1], key, inside, S.dv, S.DV)
    spoilt = not_finite(keys_index)
    keys_index = tl.where((spoilt == 0)[:, None], keys_index, 0.0)
    acc = tl.zeros([BN, DV], tl.float32)
    for i in range(begin, end, S.rows.tokens):
        acc = add_readers(
            i, end, q, q_index, lse, weights, student_lse, items, places, keys, keys_index,
            spoilt, key, first, strides, batch, group, t, scale, index_scale, acc, S,
        )  # fmt: skip
    if slot >= 0:
        put(parts + (slot * S.block + key) * S.dv, acc, key < S.block, S.dv)
    else:
        put(dk + ((batch * s + first + key) * S.groups + group) * S.dv, acc, inside, S.dv)


@triton.jit
def reader(i, end, place, items, t):
    """The query token at a place of an owner's list, and whether there is one."""
    place += i
    token = tl.load(items.query + place, mask=place < end, other=t).to(tl.int64)
    return token, (place < end) & (token < t)


@triton.jit
def add_readers(
    i, end, q, q_index, lse, weights, student_lse, items, places, keys, keys_index, spoilt, key,
    first, strides, batch, group, t, scale, index_scale, acc, S: tl.constexpr,
):  # fmt: skip
    """acc plus what the next readers give to the block's index keys."""
    TOKENS: tl.constexpr = S.rows.tokens
    BN: tl.constexpr = S.BN
    token, there = reader(i, end, tl.arange(0, S.rows.tokens), items, t)
    position = tl.load(places.position + token, mask=there, other=-1)
    weight = tl.load(weights + batch * t + token, mask=there, other=0.0)
    at = (batch * t + token) * S.groups + group
    student_stat = tl.load(student_lse + at, mask=there, other=0.0)
    edge = tl.minimum(tl.maximum(position - first, -1), S.block).to(tl.int32)
    row_slot, own = spread_tokens(S)
    row_token, row_there = reader(i, end, row_slot, items, t)
    zero = tl.zeros_like(row_token)
    index = load_rows(
        q_index, strides.dout, batch, row_token, zero + group, own & row_there, S.dv, S.DV
    )
    row = tl.arange(0, S.rows.tokens * S.rows.heads)
    head_token, head_there = reader(i, end, row // S.rows.heads, items, t)
    p = tl.zeros([TOKENS, BN], tl.float32)
    PARTS: tl.constexpr = S.rows.parts
    for part in tl.static_range(PARTS):
        head = part * S.rows.heads + row % S.rows.heads
        heads = head_there & (head < S.rows.r)
        head += group * S.rows.r
        query = load_rows(q, strides.q, batch, head_token, head, heads, S.d, S.D)
        stat = lse + (batch * t + head_token) * S.heads + head
        stat = tl.load(stat, mask=heads, other=float("inf")) * LOG2E
        p += teacher(query, stat, keys, scale, S)
    y = student(index, keys_index, index_scale, S) - student_stat[:, None] + spoilt[None, :]
    visible = key[None, :] <= edge[:, None]
    dy = tl.where(visible, (tl.exp2(y) - p / S.rows.r) * weight[:, None], 0.0)
    dy = as_rows(dy, S).to(index.dtype)
    return tl.dot(tl.trans(dy), index, acc, input_precision=S.precision)
