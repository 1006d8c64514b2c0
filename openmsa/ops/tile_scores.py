"""Scores and softmaxes in tiles, where a query's keys lie scattered over several tiles.

Scores are [T, w keys, r * width queries]: keys first, because maxima and sums over keys then run
along rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmsa.ops.tiles import Rows, Tiles
from openmsa.ops.workspace import accumulate_dtype


def keys_of(x: Tensor, tile: Tiles, groups: int, dtype: torch.dtype) -> Tensor:
    """x [b, s, g, d] -> [T, w, d]: the tokens of every tile's row, for its group's KV head."""
    return rows_of(x, tile.batch, tile.token, tile.group * x.shape[2] // groups).to(dtype)


def rows_of(x: Tensor, batch: Tensor, token: Tensor, head: int | Tensor) -> Tensor:
    """x [b, s, g, d], batch [n], token [n, w], head [n] or one for all -> [n, w, d]"""
    b, s, g, d = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    # Whatever the layout, tokens are rows of a matrix whose rows may overlap: copying whole rows by
    # number is many times faster than indexing three dimensions, and the keys are never moved.
    strides = x.stride()[:3]
    unit = math.gcd(*strides) or 1
    last = sum((size - 1) * stride for size, stride in zip((b, s, g), strides)) // unit
    token = token.clamp(max=s - 1)
    base = (batch * strides[0] + head * strides[2])[:, None]
    row = (base + token * strides[1]) // unit
    rows = x.as_strided((last + 1, d), (unit, 1)).index_select(0, row.flatten())
    return rows.view(*token.shape, d)


def clean(*keys: Tensor) -> tuple[Tensor, ...]:
    """keys [T, w, d] ... -> which tokens are not finite [T, w], and keys with those zeroed.

    A weight of 0 times NaN is NaN: without this, keys that a query does not see would spoil it.
    """
    spoilt = ~sum(x.sum(-1, dtype=accumulate_dtype(x)) for x in keys).isfinite()
    if spoilt.device.type != "cpu" or spoilt.any():
        keys = tuple(x.masked_fill(spoilt[..., None], 0) for x in keys)
    return spoilt, *keys


def scores(q: Tensor, keys: Tensor, tile: Tiles, scale: float, spoilt: Tensor) -> Tensor:
    """q [T, r * width, d], keys [T, w, d] -> scaled scores, -inf where unseen, NaN where spoilt."""
    x = torch.bmm(keys, q.mT).to(accumulate_dtype(q)).mul_(scale)
    seen = torch.where(spoilt, math.nan, 0.0).to(x.dtype)[:, :, None]
    bias = torch.where(tile.token[:, :, None] > tile.position[:, None], -math.inf, seen)
    x.unflatten(2, (-1, bias.shape[2])).add_(bias[:, :, None])
    return x


def tops(x: Tensor) -> Tensor:
    """Largest score of every place, [T, r * width, 1].

    Finite where no key is seen, so that subtracting it from -inf is not NaN.
    """
    return x.amax(1).clamp_(min=torch.finfo(x.dtype).min)[..., None]


def softmax_(x: Tensor, tile: Tiles, shift: Tensor | None = None) -> Tensor:
    """Turn scores into weights that sum to 1 over all keys of a query, in place.

    shift [C, r, 1]: about the logarithm of the sum, if known; it saves the search for the maximum.
    The sum is formed here all the same, because a rounding of lse would scale every weight.
    """
    total = exp_(x, tile, shift)
    return x.mul_(tile.spread(1 / total).mT)


def exp_(x: Tensor, tile: Tiles, shift: Tensor | None) -> Tensor:
    """Turn scores into exp(scores - shift), in place; return their sums over keys, [C, r, 1]."""
    if shift is None:
        shift = tile.collect(tops(x)).amax(1)
    x.sub_(tile.spread(shift).mT).exp_()
    total = sum_of(x, tile)
    return torch.where(total == 0, 1, total)  # a query that sees nothing has weights 0, not NaN


def sum_of(x: Tensor, tile: Tiles) -> Tensor:
    """Sum over all keys of a query, [C, r, 1]."""
    return tile.collect(x.sum(1)[..., None]).sum(1)


def by_token(sums: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """Sums per row of keys [g * rows, w * d] -> gradient of `like` [b, s, g, d], in its dtype."""
    sums = sums.view(like.shape[2], rows.count * rows.block_size, -1)
    return sums[:, rows.key_slots()].permute(1, 2, 0, 3).to(like.dtype).contiguous()
