"""The kernels of block selection: scores, their maxima and a running list of the best k.

A candidate is one whole number: the order of its score in the upper half, 2^31 - 1 - block in the
lower. No two are equal, so the best k do not depend on how the keys are split. The list lies slots
first, [K, rows], so that a thread holds the list of its row. A new candidate takes the place of the
smallest if it is larger.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 63))
HIGHEST = tl.constexpr((1 << 63) - 1)
LAST = tl.constexpr((1 << 31) - 1)
FIRST = tl.constexpr(-(1 << 31))
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def best_of_block(
    q, k_ptr, k_token, n, sk, position, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
    SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest score that each row sees in block n: [rows]. WHOLE: all rows see all of it."""
    ROWS: tl.constexpr = q.shape[0]
    DIM: tl.constexpr = q.shape[1]
    best = tl.full([ROWS], -INFINITY, tl.float32)
    d = tl.arange(0, DIM)
    first = k_ptr + tl.cast(n * BLOCK, tl.int64) * k_token
    for part in tl.static_range((BLOCK + KEYS - 1) // KEYS):
        place = part * KEYS + tl.arange(0, KEYS)
        key = n * BLOCK + place
        wanted = (place < BLOCK) & (key < sk)
        at = first + place[None, :] * k_token + d[:, None]
        if WHOLE and BLOCK % KEYS == 0 and DIM == D:
            k = tl.load(at)
        else:
            k = tl.load(at, mask=wanted[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
        if SCALE_FIRST:
            scores *= scale
        if not WHOLE:
            seen = wanted[None, :] & (key[None, :] <= position[:, None])
            scores = tl.where(seen, scores, -INFINITY)
        elif BLOCK % KEYS != 0:
            scores = tl.where((place < BLOCK)[None, :], scores, -INFINITY)
        best = tl.maximum(best, tl.max(scores, 1))  # the larger number; NaN never is
    if SCALE_FIRST:
        return best
    return best * scale


@triton.jit
def keep(kept, best, n, position, local_blocks, sink_blocks, BLOCK: tl.constexpr):
    """Offer block n with the scores `best` [rows] to the lists `kept` [K, rows]."""
    best = tl.where(best == 0, 0.0, best)  # -0 equals +0
    bits = best.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & LAST)  # bits of negative floats descend
    forced = (n > position // BLOCK - local_blocks) | (n < sink_blocks)
    order = tl.where(forced, LAST, order)
    candidate = (order.to(tl.int64) << 32) | (LAST - n)
    candidate = tl.where(n * BLOCK <= position, candidate, LOWEST)
    smallest = tl.min(kept, 0)
    taken = (kept == smallest[None, :]) & (candidate > smallest)[None, :]
    return tl.where(taken, candidate[None, :], kept)


@triton.jit
def in_block_order(kept, TOP_K: tl.constexpr):
    """Lists [K, rows] of candidates -> block numbers [rows, K], ascending, -1 at the end."""
    slot = tl.arange(0, kept.shape[0])[:, None]
    real = (slot < TOP_K) & ((kept >> 32) != FIRST)
    block = tl.where(real, LAST - (kept & LAST).to(tl.int32), LAST)
    block = tl.sort(tl.trans(block), 1)
    return tl.where(block == LAST, -1, block)


@triton.jit
def empty_lists(K: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr):
    """[K, rows]: unequal numbers below every candidate; slots beyond TOP_K are never taken."""
    slot = tl.arange(0, K)[:, None] + tl.zeros([K, ROWS], tl.int64)
    return tl.where(slot < TOP_K, LOWEST + slot, HIGHEST)


@triton.jit
def select_kernel(
    q_ptr, k_ptr, out_ptr, tiles_ptr, t, s, k_batch, k_token, scale, local_blocks, sink_blocks,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [b, t * g, di], k [b, s, di] -> blocks int32 [b, g, t, TOP_K], or, if `out` is int64, the
    candidates of one split [b, t * g, splits, TOP_K]. Grid: tiles of rows, b, splits."""
    DIM: tl.constexpr = max(16, triton.next_power_of_2(D))
    K: tl.constexpr = triton.next_power_of_2(TOP_K)
    batch, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    q0, tq, k0, sk = 0, t, 0, s
    if tiles_ptr is not None:
        q0, tq = tl.load(tiles_ptr + tile * 5), tl.load(tiles_ptr + tile * 5 + 1)
        k0, sk = tl.load(tiles_ptr + tile * 5 + 2), tl.load(tiles_ptr + tile * 5 + 3)
        tile = tl.load(tiles_ptr + tile * 5 + 4)
    row = tile * ROWS + tl.arange(0, ROWS)
    position = sk - tq + row // GROUPS
    here = row < tq * GROUPS
    flat = (batch.to(tl.int64) * t + q0) * GROUPS + row
    d = tl.arange(0, DIM)
    at = q_ptr + flat[:, None] * D + d[None, :]
    q = tl.load(at, mask=here[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += batch.to(tl.int64) * k_batch + tl.cast(k0, tl.int64) * k_token

    first = sk - tq + tile * ROWS // GROUPS
    end = min(sk, sk - tq + (tile * ROWS + ROWS - 1) // GROUPS + 1)
    blocks = (end + BLOCK - 1) // BLOCK
    share = (blocks + splits - 1) // splits
    n0 = split * share
    n1 = min(n0 + share, blocks)
    whole = max(n0, min((first + 1) // BLOCK, n1))
    kept = empty_lists(K, ROWS, TOP_K)
    for n in range(n0, whole):
        best = best_of_block(
            q, k_ptr, k_token, n, sk, position, scale, D, BLOCK, KEYS, True, SCALE_FIRST, PRECISION
        )
        kept = keep(kept, best, n, position, local_blocks, sink_blocks, BLOCK)
    for n in range(whole, n1):
        best = best_of_block(
            q, k_ptr, k_token, n, sk, position, scale, D, BLOCK, KEYS, False, SCALE_FIRST, PRECISION
        )
        kept = keep(kept, best, n, position, local_blocks, sink_blocks, BLOCK)

    slot = tl.arange(0, K)
    if out_ptr.dtype.element_ty == tl.int64:
        at = out_ptr + ((flat * splits + split) * TOP_K)[None, :] + slot[:, None]
        tl.store(at, kept, mask=here[None, :] & (slot < TOP_K)[:, None])
    else:
        where = (batch.to(tl.int64) * GROUPS + row % GROUPS) * t + q0 + row // GROUPS
        at = out_ptr + (where * TOP_K)[:, None] + slot[None, :]
        mask = here[:, None] & (slot < TOP_K)[None, :]
        tl.store(at, in_block_order(kept, TOP_K), mask=mask)


@triton.jit
def merge_kernel(
    candidates_ptr, out_ptr, t, splits,
    GROUPS: tl.constexpr, TOP_K: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Candidates int64 [b, t * g, splits, TOP_K] -> blocks int32 [b, g, t, TOP_K]. Grid: t * g, b.
    """
    K: tl.constexpr = triton.next_power_of_2(TOP_K)
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    of_row = tl.arange(0, CANDIDATES)
    size = splits * TOP_K
    at = candidates_ptr + (batch * t * GROUPS + row) * size + of_row
    candidates = tl.load(at, mask=of_row < size, other=LOWEST)
    slot = tl.arange(0, K)
    kept = tl.full([K], LOWEST, tl.int64)
    for i in range(TOP_K):
        best = tl.max(candidates, 0)
        kept = tl.where(slot == i, best, kept)
        candidates = tl.where(candidates == best, LOWEST, candidates)
    at = out_ptr + ((batch * GROUPS + row % GROUPS) * t + row // GROUPS) * TOP_K + slot
    chosen = in_block_order(kept[:, None], TOP_K)
    tl.store(at[None, :], chosen, mask=(slot < TOP_K)[None, :])
