"""Tensors to measure on. Random, or with neighbours that agree, as neighbours in a text do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.selection import Selection

PIECE = 1 << 24
TOPIC_TOKENS, TOPIC_SHARE = 64, 0.98
DATA = ("random", "agreeing")


@dataclass(frozen=True)
class Shape:
    """The heads of a layer and its budget."""

    h: int = 64
    g: int = 4
    d: int = 128
    d_index: int = 128
    block_size: int = 128
    top_k: int = 16

    @property
    def r(self) -> int:
        return self.h // self.g

    def words(self, t: int, s: int, dtype: torch.dtype) -> str:
        """The shape as a csv row tells it."""
        tokens = f"{t} of {s} tokens" if t < s else f"{s} tokens"
        heads = f"{self.h}/{self.g} heads, d {self.d}, block {self.block_size}, k {self.top_k}"
        return f"{tokens}, {heads}, {name_of(dtype)}"


@dataclass(frozen=True, eq=False)
class Inputs:
    """q [b, t, h, d], k and v [b, s, g, d], q_index [b, t, g, d_index], k_index [b, s, d_index]"""

    q: Tensor
    k: Tensor
    v: Tensor
    q_index: Tensor
    k_index: Tensor

    def last(self, t: int, s: int) -> Inputs:
        """The last t queries, in front of the first s keys."""
        q, q_index = self.q[:, -t:], self.q_index[:, -t:]
        return Inputs(q, self.k[:, :s], self.v[:, :s], q_index, self.k_index[:, :s])


def make(
    shape: Shape,
    t: int,
    s: int,
    dtype: torch.dtype,
    data: str = "random",
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Seeded inputs of t queries in front of s keys; data is "random" or "agreeing".

    Agreeing: the index queries of a stretch of 64 tokens share 98 % of their variance, so that
    neighbours have about seven of ten blocks in common; the keys stay random.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
    where = {"device": device}
    q_index = normal(batch, t, shape.g, shape.d_index, seed=3, **where)
    if data == "agreeing":
        topics = normal(batch, -(-t // TOPIC_TOKENS), shape.g, shape.d_index, seed=5, **where)
        topics = topics.repeat_interleave(TOPIC_TOKENS, 1)[:, :t]
        q_index = TOPIC_SHARE**0.5 * topics + (1 - TOPIC_SHARE) ** 0.5 * q_index
    where["dtype"] = dtype
    return Inputs(
        normal(batch, t, shape.h, shape.d, seed=0, **where),
        normal(batch, s, shape.g, shape.d, seed=1, **where),
        normal(batch, s, shape.g, shape.d, seed=2, **where),
        q_index.to(dtype),
        normal(batch, s, shape.d_index, seed=4, **where),
    )


def normal(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Seeded normal numbers, drawn in fp32 a piece at a time and rounded to `dtype`."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.empty(shape, dtype=dtype, device=device)
    flat = x.view(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE]
        piece.copy_(torch.randn(piece.numel(), generator=generator, device=device))
    return x


def agreement(selection: Selection) -> float:
    """Share of a query's blocks that the query before it chose as well."""
    before, after = selection.blocks[:, :, :-1], selection.blocks[:, :, 1:]
    if after.numel() == 0:
        return 1.0
    shared = torch.zeros((), dtype=torch.long, device=after.device)
    for slot in range(after.shape[-1]):
        here = after[..., slot : slot + 1]
        shared += ((here == before).any(-1) & (here[..., 0] >= 0)).sum()
    return float(shared / (after >= 0).sum())


def name_of(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
