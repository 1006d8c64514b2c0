"""Inputs that set a trap each.

Numbers come from Python's generator and are exact in bfloat16 and float16. Those of the index are
multiples of 1/64 up to 127/64, so that fp32 forms index scores without rounding: no engine may
excuse a block by rounding. Queries, keys and values span seven powers of two, as real ones do.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from openmsa.conformance.case import Inputs, Rule, Step


def drawn(seed: int, *shape: int, most: int = 127) -> Tensor:
    """Whole numbers from -most to most, over 64."""
    generator = random.Random(seed)
    count = int(torch.Size(shape).numel())
    numbers = [int(generator.random() * (2 * most + 1)) - most for _ in range(count)]
    return torch.tensor(numbers, dtype=torch.float32).view(shape) / 64


def spread(seed: int, *shape: int) -> Tensor:
    """The same times 2, 1, 1/2 ... 1/32 by chance."""
    generator = random.Random(1000 + seed)
    powers = [2.0 ** int(1 - 7 * generator.random()) for _ in range(torch.Size(shape).numel())]
    return drawn(seed, *shape) * torch.tensor(powers).view(shape)


def inputs(
    seed: int,
    rule: Rule | None = None,
    *,
    b: int = 1,
    t: int | None = None,
    s: int = 40,
    h: int = 4,
    g: int = 2,
    d: int = 16,
    dv: int | None = None,
    di: int = 16,
) -> Inputs:
    """Random inputs; t left out: as many queries as keys."""
    t, dv, seed = t or s, dv or d, 10 * seed
    return Inputs(
        rule or Rule(),
        q=spread(seed, b, t, h, d),
        k=spread(seed + 1, b, s, g, d),
        v=spread(seed + 2, b, s, g, dv),
        q_index=drawn(seed + 3, b, t, g, di),
        k_index=drawn(seed + 4, b, s, di),
        dout=spread(seed + 5, b, t, h, dv),
    )


def slope(x: Inputs, first: float, last: float) -> Inputs:
    """The same with index scores that go from `first` to `last` along the keys, but for noise."""
    s = x.k_index.shape[1]
    line = torch.linspace(first, last, s).mul(64).round() / 64
    q_index, k_index = x.q_index / 8, x.k_index / 8
    q_index, k_index = (y.mul(64).round() / 64 for y in (q_index, k_index))
    q_index[..., 0], k_index[..., 0] = 1.5, line
    return x.replace(q_index=q_index, k_index=k_index)


def short_tail() -> Inputs:
    """All scores are negative for one group, which must not read the tail; the other must."""
    x = slope(inputs(15, Rule(local_blocks=0), s=43), -0.9, -1.9)
    x.q_index[:, :, 1, 0] = -1.5
    return x


def ties() -> Inputs:
    """Blocks repeat: every other one has the same index keys."""
    x = inputs(5)
    once = x.k_index[:, : 2 * x.rule.block_size]
    return x.replace(k_index=once.repeat(1, 5, 1))


def zeros() -> Inputs:
    x = inputs(6)
    return x.replace(**{n: torch.zeros_like(getattr(x, n)) for n in ("q", "q_index", "k_index")})


def signed_zeros() -> Inputs:
    """Index keys are +0 in even blocks, -0 in odd ones, or the other way round by query group."""
    x = inputs(7)
    block = torch.arange(x.k_index.shape[1]) // x.rule.block_size
    sign = torch.where(block % 2 == 0, 1.0, -1.0)[None, :, None]
    k_index = torch.zeros_like(x.k_index) * sign
    return x.replace(k_index=k_index, q_index=x.q_index.abs() + 1 / 64)


def not_numbers() -> Inputs:
    """NaN in all index keys of block 0 and in one of block 3."""
    x = inputs(8)
    x.k_index[:, :4] = torch.nan
    x.k_index[:, 13] = torch.nan
    return x


def padded(seed: int, *, left: bool) -> Inputs:
    """Two rows of 29 and 40 tokens; nothing of a padded token may matter."""
    x = inputs(seed, b=2)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, slice(0, 11) if left else slice(29, 40)] = False
    return x.replace(mask=mask, dout=x.dout * mask[..., None, None], row_weights=mask.float())


def packed(seed: int, queries: list[int], keys: list[int]) -> Inputs:
    x = inputs(seed, t=sum(queries), s=sum(keys))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (queries, keys))
    return x.replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def no_selection() -> Inputs:
    x = inputs(19)
    blocks = torch.full((1, 2, 40, 3), -1, dtype=torch.int32)
    for query in range(40):
        own = query // 4
        if query % 3:
            blocks[0, 0, query, 0] = own // 2
        if query % 5:
            blocks[0, 1, query, :2] = torch.tensor([own - 1, own] if own else [0, -1])
    return x.replace(blocks=blocks, imposed=True)


def weighted() -> Inputs:
    x = inputs(20)
    weights = torch.tensor([0.0, 1.0, 0.0, 0.5]).repeat(10)[None]
    return x.replace(row_weights=weights)


def sharp_heads() -> Inputs:
    """Four heads a group, each sure of another key: the order of averaging shows."""
    x = inputs(21, h=8)
    return x.replace(q=x.q * 2)


def large_logits() -> Inputs:
    """Scaled scores of several hundreds: exp of them overflows fp32."""
    x = inputs(23)
    return x.replace(q=x.q * 64)


def append(seed: int, tokens: int, b: int = 1, padding: int | None = None) -> Step:
    """padding: so many tokens of row 0 are padding, on the left."""
    x = inputs(seed, b=b, s=tokens).replace(dout=None)
    if padding is not None:
        mask = torch.ones(b, tokens, dtype=torch.bool)
        mask[0, :padding] = False
        x = x.replace(mask=mask)
    return Step("append", x)


def crop(length: int) -> Step:
    return Step("crop", length=length)


def reorder(*rows: int) -> Step:
    return Step("reorder", rows=rows)


def decode() -> tuple[Step, ...]:
    return (append(30, 21), *(append(31 + i, 1) for i in range(7)))


def chunks() -> tuple[Step, ...]:
    return (append(40, 13), append(41, 9), append(42, 11), append(43, 6))


def cropped() -> tuple[Step, ...]:
    return (append(50, 37), crop(14), append(51, 1), append(52, 9), crop(17), append(53, 8))


def reordered() -> tuple[Step, ...]:
    return (
        append(60, 23, 3),
        reorder(2, 0, 0),
        append(61, 1, 3),
        reorder(1, 2, 1),
        append(62, 2, 3),
    )


def reloaded() -> tuple[Step, ...]:
    return (append(70, 23), Step("reload"), append(71, 1), append(72, 4))


def padded_decode() -> tuple[Step, ...]:
    return (append(90, 31, 2, 11), *(append(91 + i, 1, 2, 0) for i in range(4)))


def forked() -> tuple[Step, ...]:
    """A prefix of 21 tokens out of 37, shared by two continuations."""
    return (append(80, 37), crop(21), reorder(0, 0), append(81, 6, 2), append(82, 1, 2))
