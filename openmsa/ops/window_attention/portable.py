"""Attention over a window and sinks in bounded memory: a piece of queries against its own band.

Queries p ... p + c - 1 read among them the sinks and the keys from p - window + 1 to p + c - 1: one
short matrix of scores, where a mask cuts the two corners off.

Forward:
    X = q K * scale;  out = softmax(X) V;  lse = log sum exp X
Backward:
    P = softmax(X);  dP = dout V;  dX = P (dP - sum P dP)
    dV = P dout;  dK = dX q * scale;  dq = dX K * scale
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openmsa.ops import prefixes
from openmsa.ops.workspace import accumulate_dtype, matmul_dtype, no_autocast, rows_at_once


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, dv] -> out [b, t, h, dv], lse [b, t, h]; see the
    door."""
    return _forward(q, k, v, window, sinks, scale, cu_seqlens_q, cu_seqlens_k)


@dataclass(frozen=True)
class _Band:
    """Queries of one sequence and all keys that one of them reads: the sinks, then the band.

    piece.keys: the band; the first query sees `piece.seen` + 1 of it. sinks: where the sinks lie on
    the key axis; empty where the band begins with the sequence and holds them.
    """

    piece: prefixes.Piece
    sinks: slice

    @property
    def apart(self) -> int:
        """Sinks that stand before the band."""
        return self.sinks.stop - self.sinks.start

    def clean(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """k, v [b, s, g, d] -> poison [heads, keys] or None, both [heads, keys, d] without it."""
        tokens = self.piece.queries.stop - self.piece.queries.start
        return prefixes.clean(tokens, *(self._keys_of(x, dtype) for x in (k, v)))

    def _keys_of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [b, s, g, d] -> [heads, keys, d]"""
        band = prefixes.keys_of(x, self.piece, dtype)
        if not self.apart:
            return band
        return torch.cat([prefixes.keys_of(x, self._of_sinks(), dtype), band], 1)

    def add_to_keys(self, x: Tensor, values: Tensor) -> None:
        """Add [heads, keys, d] to where `clean` takes them from."""
        for piece, part in (
            (self._of_sinks(), values[:, : self.apart]),
            (self.piece, values[:, self.apart :]),
        ):
            x[piece.batch, piece.keys, piece.heads].add_(part.transpose(0, 1))

    def _of_sinks(self) -> prefixes.Piece:
        return replace(self.piece, keys=self.sinks)

    def reads(self, window: int, sinks: int, device: torch.device) -> Tensor:
        """Which keys a query reads, bool [tokens, keys]; the own key of query i is seen + i."""
        queries, keys = self.piece.queries, self.piece.keys
        key = torch.arange(-self.apart, keys.stop - keys.start, device=device)
        own = torch.arange(queries.stop - queries.start, device=device)[:, None] + self.piece.seen
        return (key <= own) & ((key > own - window) | (key < sinks - self.apart))


# The scores, their gradient, and both once more as factors; the mask and what it is made of.
_BYTES_PER_SCORE = 20


def _bands(q, k, window, sinks, cu_seqlens_q, cu_seqlens_k) -> Iterator[_Band]:
    """Cut q [b, t, h, d] against k [b, s, g, d] so that a band's scores fit the workspace."""
    g = k.shape[2]
    r = q.shape[2] // g
    for batch, q0, q1, k0, k1 in prefixes.sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        t, s = q1 - q0, k1 - k0
        reach = min(s, window + sinks)
        # Few queries waste little at the corners; many make efficient products, and fewer of them,
        # which is what counts on a GPU.
        tokens = max(64, reach // 4) if q.device.type == "cpu" else max(256, reach)
        at_once = rows_at_once(_BYTES_PER_SCORE * r * (reach + tokens), q.device, wanted=tokens)
        tokens = max(1, min(tokens, at_once, t))
        heads = max(1, min(g, at_once // tokens))
        for g0 in range(0, g, heads):
            for t0 in range(0, t, tokens):
                t1 = min(t, t0 + tokens)
                begin = max(0, s - t + t0 - window + 1)
                begin = 0 if begin <= sinks else begin
                piece = prefixes.Piece(
                    batch=batch,
                    heads=slice(g0, min(g, g0 + heads)),
                    queries=slice(q0 + t0, q0 + t1),
                    keys=slice(k0 + begin, k1 - t + t1),
                    seen=s - t + t0 - begin,
                )
                yield _Band(piece, slice(k0, k0 + sinks if begin else k0))


@torch.library.custom_op("openmsa::portable_window_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = _empty(q, v)
    g, factor = k.shape[2], matmul_dtype(q)
    with no_autocast(q):
        for band in _bands(q, k, window, sinks, cu_seqlens_q, cu_seqlens_k):
            queries = prefixes.queries_of(q, band.piece, g, factor)
            poison, keys, values = band.clean(k, v, factor)
            x = _scores(queries, keys, band, window, sinks, scale, poison)
            top, p = x.amax(-1, keepdim=True), x.softmax(-1)
            prefixes.put_queries(out, band.piece, g, prefixes.product(p.to(factor), values))
            # The largest weight is exp(top) / sum exp X.
            total = top - p.amax(-1, keepdim=True).log()
            prefixes.put_queries(lse[..., None], band.piece, g, total)
    return out, lse


def _scores(queries, keys, band: _Band, window, sinks, scale, poison):
    """queries [heads, r * tokens, d], keys [heads, keys, d] -> scaled [heads, r * tokens, keys].

    -inf where a key is not read, NaN where a key that is read is poisoned.
    """
    x = prefixes.product(queries, keys.mT).to(accumulate_dtype(queries)).mul_(scale)
    seen = x.new_zeros(1, 1, 1, 1)
    if poison is not None:
        seen = poison[:, None, None]
    bias = torch.where(band.reads(window, sinks, x.device), seen, -math.inf)
    x.unflatten(1, (-1, bias.shape[2])).add_(bias)
    return x


@_forward.register_fake
def _(q, k, v, *rest):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q))


@torch.library.custom_op("openmsa::portable_window_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    g, factor, sums = k.shape[2], matmul_dtype(q), accumulate_dtype(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=sums) for x in (k, v))
    with no_autocast(q):
        for band in _bands(q, k, window, sinks, cu_seqlens_q, cu_seqlens_k):
            queries, douts = (prefixes.queries_of(x, band.piece, g, factor) for x in (q, dout))
            poison, keys, values = band.clean(k, v, factor)
            p = _scores(queries, keys, band, window, sinks, scale, poison).softmax(-1)
            band.add_to_keys(dv, prefixes.product_over_rows(p.to(factor), douts))
            # sum P dP equals dout . out, but that form rounds differently from dP.
            dp = prefixes.product(douts, values.mT).to(sums)
            dx = torch.ops.aten._softmax_backward_data(dp, p, -1, sums).mul_(scale).to(factor)
            band.add_to_keys(dk, prefixes.product_over_rows(dx, queries))
            prefixes.put_queries(dq, band.piece, g, prefixes.product(dx, keys))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(dout, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, *numbers, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
    ctx.numbers = numbers


def _differentiate(ctx, dout, _):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dq, dk, dv = _backward(dout, *tensors, *ctx.numbers, cu_seqlens_q, cu_seqlens_k)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
