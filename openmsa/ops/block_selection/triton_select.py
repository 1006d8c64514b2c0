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
def scores_of(
    q, q_at, k_at, q_mask, key_mask, CHUNK: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q [rows, DIM] . k [DIM, keys], CHUNK channels at a time: [rows, keys]. A chunk of q is read
    again for every tile, so that its parts in tf32 need not stay in registers."""
    DIM: tl.constexpr = q.shape[1]
    d = tl.arange(0, CHUNK)
    scores = tl.zeros([q.shape[0], k_at.shape[1]], tl.float32)
    for start in tl.static_range(0, DIM, CHUNK):
        if WHOLE and DIM == D:
            k = tl.load(k_at + start)
        else:
            k = tl.load(k_at + start, mask=key_mask & (start + d < D)[:, None], other=0.0)
        if CHUNK < DIM:
            q = tl.load(q_at + start, mask=q_mask & (start + d < D)[None, :], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), scores, input_precision=PRECISION)
    return scores


@triton.jit
def best_of_tile(
    query, k_ptr, k_token, tile, sk, position, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest score that each row sees in a tile of keys: [rows]. WHOLE: all rows see all of it."""
    q, q_at, q_mask = query
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    n, place = tile // PARTS, tile % PARTS * KEYS + tl.arange(0, KEYS)
    key = n * BLOCK + place
    wanted = (place < BLOCK) & (key < sk)
    d = tl.arange(0, CHUNK)
    k_at = k_ptr + tl.cast(n * BLOCK, tl.int64) * k_token + place[None, :] * k_token + d[:, None]
    EVEN: tl.constexpr = BLOCK % KEYS == 0
    mask = wanted[None, :]
    scores = scores_of(q, q_at, k_at, q_mask, mask, CHUNK, D, WHOLE and EVEN, PRECISION)
    if SCALE_FIRST:
        scores *= scale
    if not WHOLE:
        seen = wanted[None, :] & (key[None, :] <= position[:, None])
        scores = tl.where(seen, scores, -INFINITY)
    elif not EVEN:
        scores = tl.where((place < BLOCK)[None, :], scores, -INFINITY)
    best = tl.max(scores, 1)
    return best if SCALE_FIRST else best * scale


@triton.jit
def keep(kept, best, n, last, position, local_blocks, sink_blocks, BLOCK: tl.constexpr):
    """Offer block n with the scores `best` [rows] to the lists `kept` [K, rows]; only if `last`."""
    best = tl.where(best == 0, 0.0, best)  # -0 equals +0
    bits = best.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & LAST)  # bits of negative floats descend
    forced = (n > position // BLOCK - local_blocks) | (n < sink_blocks)
    order = tl.where(forced, LAST, order)
    candidate = (order.to(tl.int64) << 32) | (LAST - n)
    candidate = tl.where((n * BLOCK <= position) & last, candidate, LOWEST)
    smallest = tl.min(kept, 0)
    taken = (kept == smallest[None, :]) & (candidate > smallest)[None, :]
    return tl.where(taken, candidate[None, :], kept)


@triton.jit
def in_block_order(kept, TOP_K: tl.constexpr):
    """Lists [K, rows] of candidates -> block numbers [K, rows], ascending, -1 at the end."""
    slot = tl.arange(0, kept.shape[0])[:, None]
    real = (slot < TOP_K) & ((kept >> 32) != FIRST)
    block = tl.where(real, LAST - (kept & LAST).to(tl.int32), LAST)
    ordered = block
    for i in range(TOP_K):
        smallest = tl.min(block, 0)[None, :]
        ordered = tl.where(slot == i, smallest, ordered)
        block = tl.where(block == smallest, LAST, block)
    return tl.where(ordered == LAST, -1, ordered)


@triton.jit
def empty_lists(K: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr):
    """[K, rows]: unequal numbers below every candidate; slots beyond TOP_K are never taken."""
    slot = tl.arange(0, K)[:, None] + tl.zeros([K, ROWS], tl.int64)
    return tl.where(slot < TOP_K, LOWEST + slot, HIGHEST)


@triton.jit
def visit(
    kept, best, query, k_ptr, k_token, begin, end, sk, position, scale, local_blocks,
    sink_blocks, D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Score the tiles begin ... end - 1 and offer their blocks to `kept`."""
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    for tile in range(begin, end):
        new = best_of_tile(
            *(query, k_ptr, k_token, tile, sk, position, scale),
            *(D, BLOCK, KEYS, CHUNK, WHOLE, SCALE_FIRST, PRECISION),
        )
        # The larger number, which NaN never is.
        best = tl.maximum(new, tl.where(tile % PARTS == 0, -INFINITY, best))
        last = tile % PARTS == PARTS - 1
        kept = keep(kept, best, tile // PARTS, last, position, local_blocks, sink_blocks, BLOCK)
    return kept, best


@triton.jit
def place_of(tile, tiles_ptr, t, s):
    """First query, queries, first key, keys of a tile's sequence, and which of its tiles it is."""
    if tiles_ptr is None:
        place = 0, t, 0, s, tile
    else:
        at = tiles_ptr + tile * 5
        place = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    return place


@triton.jit
def select_kernel(
    q_ptr, k_ptr, out_ptr, tiles_ptr, t, s, k_batch, k_token, scale, local_blocks, sink_blocks,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, SCALE_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q [b, t * g, di], k [b, s, di] -> blocks int32 [b, g, t, TOP_K], or, if `out` is int64, the
    candidates of one split [b, t * g, splits, TOP_K]. Grid: tiles of rows, b, splits."""
    DIM: tl.constexpr = triton.next_power_of_2(D) if D > 16 else 16
    K: tl.constexpr = triton.next_power_of_2(TOP_K)
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    batch, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    q0, tq, k0, sk, tile = place_of(tile, tiles_ptr, t, s)
    row = tile * ROWS + tl.arange(0, ROWS)
    position = sk - tq + row // GROUPS
    here = row < tq * GROUPS
    flat = (batch.to(tl.int64) * t + q0) * GROUPS + row
    d = tl.arange(0, DIM)
    at = q_ptr + flat[:, None] * D
    q = tl.load(at + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
    query = q, at + tl.arange(0, CHUNK)[None, :], here[:, None]
    k_ptr += batch.to(tl.int64) * k_batch + tl.cast(k0, tl.int64) * k_token

    first, last = sk - tq + tile * ROWS // GROUPS, sk - tq + (tile * ROWS + ROWS - 1) // GROUPS
    blocks = (min(sk, last + 1) + BLOCK - 1) // BLOCK
    share = (blocks + splits - 1) // splits
    n0, n1 = split * share, min((split + 1) * share, blocks)
    whole = max(n0, min((first + 1) // BLOCK, n1))  # all rows see the blocks before this one
    kept, best = empty_lists(K, ROWS, TOP_K), tl.full([ROWS], -INFINITY, tl.float32)
    kept, best = visit(
        *(kept, best, query, k_ptr, k_token, n0 * PARTS, whole * PARTS, sk, position, scale),
        *(local_blocks, sink_blocks, D, BLOCK, KEYS, CHUNK, True, SCALE_FIRST, PRECISION),
    )
    kept, best = visit(
        *(kept, best, query, k_ptr, k_token, whole * PARTS, n1 * PARTS, sk, position, scale),
        *(local_blocks, sink_blocks, D, BLOCK, KEYS, CHUNK, False, SCALE_FIRST, PRECISION),
    )

    slot = tl.arange(0, K)[:, None]
    wanted = here[None, :] & (slot < TOP_K)
    if out_ptr.dtype.element_ty == tl.int64:
        place = flat * splits + split
        tl.store(out_ptr + place[None, :] * TOP_K + slot, kept, mask=wanted)
    else:
        place = (batch.to(tl.int64) * GROUPS + row % GROUPS) * t + q0 + row // GROUPS
        ordered = in_block_order(kept, TOP_K)
        tl.store(out_ptr + place[None, :] * TOP_K + slot, ordered, mask=wanted)


@triton.jit
def merge_kernel(
    candidates_ptr, out_ptr, t, splits,
    GROUPS: tl.constexpr, TOP_K: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """int64 [b, t * g, splits, TOP_K] -> blocks int32 [b, g, t, TOP_K]. Grid: t * g, b."""
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
    tl.store(at[:, None], in_block_order(kept[:, None], TOP_K), mask=(slot < TOP_K)[:, None])
