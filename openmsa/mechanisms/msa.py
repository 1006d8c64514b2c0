"""MiniMax Sparse Attention (arXiv 2606.13392), equations 6 to 10 in our letters, g = h // r.

I[t, s, g] = q_index[t, g] . k_index[s] / sqrt(d_index)         a query per group, a shared key
M[t, n, g] = max of I[t, s, g] over the visible s of block n    a block is worth its best key
S[t, g]    = the query's own block, then the best others of M, k in all
O[t, h]    = softmax over s in S[t, g] of (q[t, h] . k[s, g] / sqrt(d)) @ v[s, g]
loss       = mean over t, g of KL(mean over the group's h of softmax(q k) || softmax(I))
             both over s in S[t, g]; over every visible s while the index warms up

Scored: blocks, by their best key in a learned index, and the own block is kept whatever it scores.
Shared: a choice by the heads of a group, one index key by all groups. Trained by: the loss, which
reaches q_index and k_index only; their inputs are detached from the model. Remembered: k, v and
k_index.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openmsa.ops import checks
from openmsa.ops.block_selection import select_blocks
from openmsa.ops.dense_attention import dense_attention
from openmsa.ops.index_loss import index_loss
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.selection import Selection


@dataclass(frozen=True)
class MSAConfig:
    """The numbers of MSA: tokens (block_size), blocks (top_k, *_blocks), channels (d_index).

    d_index: width of the index, None for the model's head dim. local_blocks latest and sink_blocks
    first blocks are always kept, within top_k. layers: which layers are sparse, None for all.
    Raises ValueError for numbers that contradict each other.
    """

    block_size: int = 128
    top_k: int = 16
    d_index: int | None = None
    local_blocks: int = 1
    sink_blocks: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        checks.positive(block_size=self.block_size, top_k=self.top_k)
        checks.forced(self.local_blocks, self.sink_blocks, self.top_k)
        if self.d_index is not None:
            checks.positive(d_index=self.d_index)
        object.__setattr__(self, "layers", checks.layers(self.layers))


REMEMBERS = ("k", "v", "k_index")


def select(config: MSAConfig, q_index: Tensor, k_index: Tensor, **how) -> Selection:
    """q_index [b, t, g, d_index], k_index [b, s, d_index] -> blocks [b, g, t, k].

    how, here and below: scales, cu_seqlens_q, cu_seqlens_k and backend, as in the operations.
    """
    return select_blocks(
        q_index,
        k_index,
        block_size=config.block_size,
        top_k=config.top_k,
        local_blocks=config.local_blocks,
        sink_blocks=config.sink_blocks,
        **how,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None,
    *,
    scale: float | None = None,
    **how,
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value] -> out [b, t, h, d_value], lse

    Without a selection, over every visible key.
    """
    if selection is None:
        return dense_attention(q, k, v, scale=scale, return_lse=True, **how)
    return sparse_attention(q, k, v, selection, scale=scale, return_lse=True, **how)


def loss(
    q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, selection: Selection | None, **how
) -> Tensor:
    """The index against the attention it predicts, on the support that attention had; a scalar."""
    return index_loss(q, k, q_index, k_index, selection, **how)


PHASES = ("dense", "warmup", "sparse")


@dataclass(frozen=True, eq=False)
class MSAOutput:
    """out [b, t, h, d_value]; index_loss scalar or None; selection or None; lse fp32 [b, t, h]."""

    out: Tensor
    index_loss: Tensor | None
    selection: Selection | None
    lse: Tensor


def msa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    block_size: int = 128,
    top_k: int = 16,
    phase: str = "sparse",
    local_blocks: int = 1,
    sink_blocks: int = 0,
    scale: float | None = None,
    index_scale: float | None = None,
    row_weights: Tensor | None = None,
    with_index_loss: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> MSAOutput:
    """The attention of one MSA layer, and what its index has to learn from it.

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value], q_index [b, t, g, d_index],
    k_index [b, s, d_index]; queries are the last t of the s keys. Phases: "dense" (dense attention,
    index unused), "warmup" (dense attention, loss over the whole prefix), "sparse" (select, attend,
    loss over the selected blocks). q, k, v get gradient from `out` only, q_index and k_index from
    `index_loss` only. row_weights [b, t] weigh query tokens in the loss. Packed sequences: batch 1
    with cu_seqlens_q and cu_seqlens_k int32 [sequences + 1].

    Raises ValueError for an unknown phase and for arguments that do not fit together.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    where = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "backend": backend}
    selection = kl = None
    if phase == "sparse":
        config = MSAConfig(block_size, top_k, None, local_blocks, sink_blocks)
        selection = select(config, q_index, k_index, index_scale=index_scale, **where)
    out, lse = attend(q, k, v, selection, scale=scale, **where)
    if with_index_loss and phase != "dense":
        how = {"scale": scale, "index_scale": index_scale, "row_weights": row_weights, "lse": lse}
        kl = loss(q, k, q_index, k_index, selection, **how, **where)
    return MSAOutput(out, kl, selection, lse)
