"""Dense attention as torch offers it, given every advantage: its own layout, ready-made heads.

What would take minutes is measured on a part of its heads or query tokens and scaled: the work of
dense attention is the same for every head, and `scaled` says by how much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from openmsa.accounting.inputs import Inputs
from openmsa.accounting.timing import Times, timed
from openmsa.accounting.work import attend_flops, causal_pairs

SLICE_FLOPS = 5e11


@dataclass(frozen=True)
class Rival:
    """Seconds for the whole of it; scaled: 1, or how many times more than was measured."""

    times: Times
    scaled: float
    words: str


def heads_measured(x: Inputs, t: int, flops: float = SLICE_FLOPS, factor: float = 1) -> int:
    """How many query heads to measure: all, or as many as `flops` allow, a divisor of h."""
    h, d = x.q.shape[2:]
    one = factor * attend_flops(causal_pairs(t, x.k.shape[1]), 1, d, d)
    return max(n for n in range(1, h + 1) if h % n == 0 and (n == 1 or n * one <= flops))


def prefill(x: Inputs, *, seconds: float, flops: float = SLICE_FLOPS) -> Rival:
    """Causal SDPA of all queries of x. Queries behind a prefix: the prefix without a mask, then the
    causal rest; merging the two is not charged, since SDPA gives no lse to merge by.
    """
    t, s = x.q.shape[1], x.k.shape[1]
    heads = heads_measured(x, t, flops)
    q, k, v = _heads_first(x, heads)
    with torch.no_grad():
        tail = timed(
            lambda: sdpa(q, k[:, :, s - t :], v[:, :, s - t :], is_causal=True), seconds=seconds
        )
        if t < s:
            prefix = (k[:, :, : s - t], v[:, :, : s - t])
            tail = tail.plus(timed(lambda: sdpa(q, *prefix), seconds=seconds))
    return _rival(tail, x.q.shape[2], heads, "torch SDPA")


def backward(x: Inputs, dout: Tensor, *, seconds: float, flops: float = SLICE_FLOPS) -> Rival:
    """Gradients of causal SDPA, as many queries as keys."""
    heads = heads_measured(x, x.q.shape[1], flops, factor=2.5)
    q, k, v = (part.contiguous().requires_grad_() for part in _heads_first(x, heads))
    out = sdpa(q, k, v, is_causal=True)
    gradient = dout[:, :, :heads].transpose(1, 2).contiguous()
    times = timed(
        lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), seconds=seconds
    )
    return _rival(times, x.q.shape[2], heads, "torch SDPA, backward")


@torch.no_grad()
def decode(x: Inputs, *, seconds: float) -> Rival:
    """One query token over all keys, the faster of two ways to ask torch for it: `enable_gqa`, and
    the heads of a group as rows of one product. One group is measured.
    """
    g = x.k.shape[2]
    r = x.q.shape[2] // g
    q, k, v = (part.transpose(1, 2) for part in (x.q[:, :, :r], x.k[:, :, :1], x.v[:, :, :1]))
    q = q[:, :, -1:]
    rows = q.transpose(1, 2)
    ways = {
        "torch SDPA, enable_gqa": lambda: sdpa(q, k, v, enable_gqa=True),
        "torch SDPA, a group's heads as rows": lambda: sdpa(rows, k, v),
    }
    found = {name: timed(way, seconds=seconds) for name, way in ways.items()}
    best = min(found, key=lambda name: found[name].median)
    return _rival(found[best], g, 1, best, "groups")


def _heads_first(x: Inputs, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, heads, tokens, d]: the first query heads with their KV heads, ready-made."""
    r = x.q.shape[2] // x.k.shape[2]
    q = x.q[:, :, :heads].transpose(1, 2).contiguous()
    of = torch.arange(heads) // r
    groups = int(of[-1]) + 1
    k, v = (y[:, :, :groups].transpose(1, 2).contiguous() for y in (x.k, x.v))
    if groups == 1:
        return q, k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    return q, k[:, of], v[:, of]


def _rival(times: Times, total: int, measured: int, words: str, unit: str = "heads") -> Rival:
    scaled = total / measured
    if scaled > 1:
        words += f" (measured on {measured} of {total} {unit}, scaled)"
    return Rival(times.scaled(scaled), scaled, words)
