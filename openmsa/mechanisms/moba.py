"""MoBA, Mixture of Block Attention (arXiv 2502.13189), in our letters, g = h // r.

M[t, n, h] = q[t, h] . mean over s in block n of k[s, g]    a block is worth its mean key
S[t, h]    = the query's own block, then the best earlier blocks of M, k in all
O[t, h]    = softmax over s in S[t, h] of (q[t, h] . k[s, g] / sqrt(d)) @ v[s, g]

Scored: blocks of keys, by their mean in fp32, unscaled, for every query head. Shared: nothing, each
query head chooses for itself. Trained by: the language model's loss alone, through the attention;
the choice has no parameters and passes no gradient. Remembered: k and v; a cache may also keep the
mean of every whole block, k_pooled, which is otherwise made of all of k at every call.

Where paper and code disagree: the paper's top_k counts the own block, so top_k=1 is attention
within blocks. The official `moba_naive.py` does that; `moba_efficient.py` answers top_k=1 with full
causal attention. Here, as in the paper, the blocks. The code has no decoding and repeats k and v
for every query head; here both follow from the equations.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openmsa.ops import checks
from openmsa.ops.dense_attention import dense_attention
from openmsa.ops.pooled_selection import mean_pool, pooled_selection
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.selection import Selection


@dataclass(frozen=True)
class MoBAConfig:
    """The numbers of MoBA: tokens (block_size) and blocks (top_k, the query's own counted).

    The defaults are those of the paper's model for 1M tokens. layers: which layers are sparse, None
    for all; the paper keeps its last layers dense. Raises ValueError for numbers below 1.
    """

    block_size: int = 4096
    top_k: int = 12
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        checks.positive(block_size=self.block_size, top_k=self.top_k)
        object.__setattr__(self, "layers", checks.layers(self.layers))


REMEMBERS = ("k", "v")


def select(
    config: MoBAConfig,
    q: Tensor,
    k: Tensor,
    *,
    k_pooled: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """q [b, t, h, d], k [b, s, g, d] -> blocks [b, h, t, k].

    k_pooled [b, n, g, d]: what `mean_pool` makes of k, if known.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    block = {"kernel": config.block_size, "stride": config.block_size}
    if k_pooled is None:
        k_pooled, _ = mean_pool(k, **block, cu_seqlens_k=cu_seqlens_k)
    return pooled_selection(
        q,
        k_pooled,
        num_keys=k.shape[1],
        **block,
        block_size=config.block_size,
        top_k=config.top_k,
        score="dot",
        per_head=True,
        scale=1.0,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        backend=backend,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None,
    *,
    scale: float | None = None,
    **where,
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value] -> out [b, t, h, d_value], lse

    One softmax over the own and the chosen blocks. Without a selection, over every visible key.
    where: cu_seqlens_q, cu_seqlens_k and backend, as in the operations.
    """
    if selection is None:
        return dense_attention(q, k, v, scale=scale, return_lse=True, **where)
    return sparse_attention(q, k, v, selection, scale=scale, return_lse=True, **where)


def loss() -> None:
    """Blocks are chosen by the keys themselves, so nothing has to be taught."""


PHASES = ("dense", "sparse")


@dataclass(frozen=True, eq=False)
class MoBAOutput:
    """out [b, t, h, d_value]; index_loss None; selection or None; lse fp32 [b, t, h]."""

    out: Tensor
    index_loss: None
    selection: Selection | None
    lse: Tensor


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    k_pooled: Tensor | None = None,
    phase: str = "sparse",
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> MoBAOutput:
    """The attention of one MoBA layer.

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value]; queries are the last t of the s keys.
    Phases: "dense" (dense attention), "sparse" (select, attend). Packed sequences: batch 1 with
    cu_seqlens_q and cu_seqlens_k int32 [sequences + 1]. k_pooled [b, n, g, d]: the mean of every
    whole block (`mean_pool`), if known; made of k if left out.

    Raises ValueError for an unknown phase and for arguments that do not fit together.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    borders = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    where = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), borders, strict=True), backend=backend)
    selection = select(config, q, k, k_pooled=k_pooled, **where) if phase == "sparse" else None
    out, lse = attend(q, k, v, selection, scale=scale, **where)
    return MoBAOutput(out, None, selection, lse)
