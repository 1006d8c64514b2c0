"""Prefixes: dense causal work cut into pieces of queries with every key that the last of them sees.

A piece belongs to one sequence and some KV heads. Its scores are a whole number of rows, so a
softmax needs no second pass, and only the last keys of a piece, those beside its own queries, need
a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.ops.workspace import accumulate_dtype, rows_at_once

_ROWS = 128  # of a sum in fp32


@dataclass(frozen=True)
class Piece:
    """Places on the token axes; the first query sees `seen` + 1 of the keys, the last sees all."""

    batch: int
    heads: slice  # KV heads
    queries: slice
    keys: slice
    seen: int


def pieces(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bytes_per_score: int,
) -> Iterator[Piece]:
    """Cut q [b, t, h, d] against k [b, s, g, d] so that a piece's scores fit the workspace."""
    g = k.shape[2]
    r = q.shape[2] // g
    for batch, q0, q1, k0, k1 in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        t, s = q1 - q0, k1 - k0
        if t == 0:
            continue
        # At least 256 rows of scores if they fit: each piece adds to the gradient of every key.
        at_once = rows_at_once(bytes_per_score * r * s, q.device, wanted=-(-256 // r))
        # A quarter of the queries at most: early queries then skip most of the keys.
        tokens = min(at_once, max(64, -(-t // 4)), t)
        heads = max(1, min(g, at_once // tokens))
        for g0 in range(0, g, heads):
            for t0 in range(0, t, tokens):
                t1 = min(t, t0 + tokens)
                yield Piece(
                    batch=batch,
                    heads=slice(g0, min(g, g0 + heads)),
                    queries=slice(q0 + t0, q0 + t1),
                    keys=slice(k0, k1 - t + t1),
                    seen=s - t + t0,
                )


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[tuple[int, int, int, int, int]]:
    """(batch, first query, one past the last, first key, one past the last) of every sequence."""
    if cu_seqlens_q is None:
        return [(i, 0, q.shape[1], 0, k.shape[1]) for i in range(q.shape[0])]
    borders_q, borders_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(0, *borders_q[i : i + 2], *borders_k[i : i + 2]) for i in range(len(borders_q) - 1)]


def queries_of(x: Tensor, piece: Piece, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """x [b, t, h, d] -> [heads, r * tokens, d], a group's heads one after the other."""
    x = x[piece.batch, piece.queries].unflatten(1, (kv_heads, -1))[:, piece.heads]
    return x.permute(1, 2, 0, 3).flatten(1, 2).to(dtype)


def put_queries(x: Tensor, piece: Piece, kv_heads: int, values: Tensor) -> None:
    """Write [heads, r * tokens, d] back to where `queries_of` took it from."""
    x = x[piece.batch, piece.queries].unflatten(1, (kv_heads, -1))[:, piece.heads]
    x.copy_(values.unflatten(1, (x.shape[2], x.shape[0])).permute(2, 0, 1, 3))


def keys_of(x: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    """x [b, s, g, d] -> [heads, keys, d]"""
    return x[piece.batch, piece.keys, piece.heads].transpose(0, 1).to(dtype)


def clean(t: int, *keys: Tensor) -> tuple[Tensor | None, ...]:
    """keys [b, s, g, d] ... -> poison [b, s, g], NaN where one is not finite and else 0, and keys
    with those zeroed.

    A weight of 0 times NaN is NaN, so without this a query would be spoilt by keys after it. None:
    nothing to do.
    """
    if t <= 1:  # nothing comes after a single query
        return None, *keys
    sums = accumulate_dtype(keys[0])
    spoilt = ~sum(x.sum(-1, dtype=sums) for x in keys).isfinite()
    if spoilt.device.type == "cpu" and not spoilt.any():
        return None, *keys
    keys = tuple(x.masked_fill(spoilt[..., None], 0) for x in keys)
    return torch.where(spoilt, math.nan, 0.0).to(sums), *keys


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [heads, n, m] @ b [heads, m, l]; a CPU would copy strided factors to multiply a batch."""
    if a.device.type != "cpu":
        return torch.bmm(a, b)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for i in range(a.shape[0]):
        torch.mm(a[i], b[i], out=out[i])
    return out


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a [heads, n, m], b [heads, n, l] -> a.mT @ b, [heads, m, l], where n counts heads and tokens.

    fp32 is summed in parts: one sum over all heads of a group would round worse than one by head.
    """
    if a.device.type != "cpu" or a.dtype != torch.float32:
        return product(a.mT, b)
    out = a.new_zeros(a.shape[0], a.shape[2], b.shape[2])
    for i in range(a.shape[0]):
        for rows, others in zip(a[i].split(_ROWS), b[i].split(_ROWS), strict=True):
            out[i] += rows.mT @ others  # addmm would go on with the same sum
    return out


def scores(q: Tensor, k: Tensor, piece: Piece, scale: float, poison: Tensor | None) -> Tensor:
    """q [heads, r * tokens, d], k [heads, keys, d] -> scaled [heads, r, tokens, keys].

    -inf in the future, NaN where poisoned.
    """
    tokens = piece.queries.stop - piece.queries.start
    x = product(q, k.mT).to(accumulate_dtype(q)).mul_(scale).unflatten(1, (-1, tokens))
    here = torch.arange(tokens, device=q.device)
    seen = x.new_zeros(1, 1, 1)
    if poison is not None:
        poison = poison[piece.batch, piece.keys, piece.heads].mT[:, None, None]
        x[..., : piece.seen].add_(poison[..., : piece.seen])
        seen = poison[..., piece.seen :]
    x[..., piece.seen :].add_(torch.where(here > here[:, None], -math.inf, seen))
    return x
