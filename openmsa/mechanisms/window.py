"""Sliding window with attention sinks (StreamingLLM, arXiv 2309.17453), and as an option the global
and random blocks of BigBird (arXiv 2007.14062) and Longformer (arXiv 2004.05150), made causal.

R[p]    = every s <= p with s > p - window or s < sinks
O[t, h] = softmax over s in R[p] of (q[t, h] . k[s, g] / sqrt(d)) @ v[s, g]        p: place of t
With global or random blocks, by whole blocks of block_size tokens instead, the own one causal:
R[p]    = the first global_blocks (or as many as hold the sinks), the latest that hold `window`
          tokens counted from the end of the own block, and random_blocks of those between

Scored: nothing, a query reads by its place alone. Shared: the window by all heads; random blocks
are drawn per KV group and query block, as BigBird draws them per head. Trained by: nothing but the
model's own loss. Remembered: k and v; a cache could drop what is neither sink nor window, ours
keeps all (with random blocks any of them can be asked for again).

Where others differ: StreamingLLM renumbers positions inside its cache, we leave every key where it
stood. BigBird and Longformer read both ways and their global tokens read everything: here nobody
reads the future, so global blocks are only read. BigBird draws from all blocks between, we draw one
from each of random_blocks equal parts of them: never the same twice, and the same whatever the
length, the batch and the device. Every layer that shares a config draws the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.ops import checks
from openmsa.ops.dense_attention import dense_attention
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.ops.window_attention import window_attention
from openmsa.selection import Selection


@dataclass(frozen=True)
class WindowConfig:
    """The numbers of a window: tokens (window, sinks, block_size) and blocks (*_blocks).

    global_blocks, random_blocks: 0 and 0 is the window to the token, else whole blocks are read.
    seed: of the random blocks. layers: which layers are sparse, None for all. Raises ValueError for
    numbers that are none.
    """

    window: int = 512
    sinks: int = 4
    global_blocks: int = 0
    random_blocks: int = 0
    block_size: int = 64
    seed: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        checks.positive(window=self.window, block_size=self.block_size)
        for name in ("sinks", "global_blocks", "random_blocks", "seed"):
            checks.whole(name, getattr(self, name), 0)
        object.__setattr__(self, "layers", checks.layers(self.layers))

    @property
    def first_blocks(self) -> int:
        """Blocks at the beginning of a sequence that every query reads."""
        return max(self.global_blocks, -(-self.sinks // self.block_size))

    @property
    def local_blocks(self) -> int:
        """Blocks up to the query's own that it reads."""
        return -(-self.window // self.block_size)


REMEMBERS = ("k", "v")


def select(
    config: WindowConfig,
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Selection | None:
    """q [b, t, h, d], k [b, s, g, d], of which only shapes count -> blocks [b, g, t, k].

    None where the window is exact to the token.
    """
    checks.shapes(q=(q, "b t h d"), k=(k, "b s g d"))
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    if config.global_blocks == config.random_blocks == 0:
        return None
    (b, t), (s, g) = q.shape[:2], k.shape[1:3]
    position = _positions(t, s, cu_seqlens_q, cu_seqlens_k, q.device)
    blocks = _pattern(config, g, -(-s // config.block_size), q.device)
    blocks = blocks[:, position // config.block_size]
    return Selection(blocks.expand(b, -1, -1, -1), config.block_size)


def _positions(t, s, cu_seqlens_q, cu_seqlens_k, device) -> Tensor:
    """Where every query token stands in its own sequence, [t]."""
    token = torch.arange(t, device=device)
    if cu_seqlens_q is None:
        return token + (s - t)
    last = cu_seqlens_q[1:].contiguous()
    owner = torch.searchsorted(last, token, right=True).clamp(max=last.shape[0] - 1)
    return token - last[owner] + cu_seqlens_k.diff()[owner]


def _pattern(config: WindowConfig, groups: int, n: int, device: torch.device) -> Tensor:
    """What the queries of every block read, int32 [groups, n, k], ascending, -1 at the end."""
    own = torch.arange(n, device=device)[None, :, None]
    group = torch.arange(groups, device=device)[:, None, None]
    first, latest, drawn = (
        torch.arange(number, device=device)
        for number in (config.first_blocks, config.local_blocks, config.random_blocks)
    )
    window = own - latest
    between = (own - config.local_blocks + 1 - config.first_blocks).clamp(min=0)
    part, next_part = (between * i // max(1, len(drawn)) for i in (drawn, drawn + 1))
    size = next_part - part
    draw = part + _scattered(config.seed, group, own, drawn) % size.clamp(min=1)
    blocks = [
        torch.where(first <= own - config.local_blocks, first, -1),
        torch.where(size > 0, draw + config.first_blocks, -1),
        window.clamp(min=-1),
    ]
    blocks = torch.cat([x.expand(groups, n, -1) for x in blocks], -1)
    blocks = torch.where(blocks < 0, n, blocks).sort(-1).values
    return torch.where(blocks == n, -1, blocks).to(torch.int32)


def _scattered(*numbers: Tensor | int) -> Tensor:
    """A number of 32 bits that looks drawn at random, the same for the same numbers everywhere."""
    bits, factor = (1 << 32) - 1, 0x45D9F3B
    x = 0
    for number in numbers:
        x = (x ^ (number + 0x9E3779B9)) & bits
        for _ in range(2):
            x = ((x >> 16) ^ x) * factor & bits
        x = (x >> 16) ^ x
    return x


def attend(
    config: WindowConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None,
    *,
    scale: float | None = None,
    **where,
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value] -> out [b, t, h, d_value], lse

    Without a selection, over the window and the sinks. where: cu_seqlens_q, cu_seqlens_k, backend.
    """
    how = {"scale": scale, "return_lse": True, **where}
    if selection is None:
        return window_attention(q, k, v, window=config.window, sinks=config.sinks, **how)
    return sparse_attention(q, k, v, selection, **how)


def loss() -> None:
    """A place needs no teaching."""


PHASES = ("dense", "sparse")


@dataclass(frozen=True, eq=False)
class WindowOutput:
    """out [b, t, h, d_value]; index_loss None; selection or None; lse fp32 [b, t, h]."""

    out: Tensor
    index_loss: None
    selection: Selection | None
    lse: Tensor


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: WindowConfig,
    *,
    phase: str = "sparse",
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> WindowOutput:
    """The attention of one layer with a sliding window.

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value]; queries are the last t of the s keys.
    Phases: "dense" (dense attention), "sparse". Packed sequences: batch 1 with cu_seqlens_q and
    cu_seqlens_k int32 [sequences + 1]. Raises ValueError for an unknown phase and for arguments
    that do not fit together.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    borders = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    how = {"scale": scale, "backend": backend, **borders}
    if phase == "dense":
        out, lse = dense_attention(q, k, v, return_lse=True, **how)
        return WindowOutput(out, None, None, lse)
    selection = select(config, q, k, **borders)
    out, lse = attend(config, q, k, v, selection, **how)
    return WindowOutput(out, None, selection, lse)
