"""MiniMax Sparse Attention (arXiv 2606.13392).

I[t, s, g]  = q_index[t, g] . k_index[s] / sqrt(d_index)         index: one query per group, one shared key   (6)
M[t, n, g]  = max of I[t, s, g] over the visible s of block n    score of a block                             (7)
S[t, g]     = own block, then the best others of M, k in all     select
O[t, h]     = softmax over s in S[t, g] of (q[t, h] . k[s, g] / sqrt(d)) @ v[s, g]     attend, g = h // r     (8)
loss        = mean over t, g of KL(mean over h of softmax(q k) || softmax(I)), both on S[t, g]            (9, 10)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openmsa.ops.block_selection import select_blocks
from openmsa.ops.dense_attention import dense_attention
from openmsa.ops.index_loss import index_loss
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.selection import Selection

REMEMBERS = ("k", "v", "k_index")
PHASES = ("dense", "warmup", "sparse")


@dataclass(frozen=True)
class MSAConfig:
    """What MSA adds to a model. Sizes are in tokens (block_size), blocks (top_k, *_blocks) and
    channels (d_index).

    d_index: width of the index, None for the model's head dim. layers: which layers become sparse,
    None for all. Raises ValueError for values that contradict each other.
    """

    block_size: int = 128
    top_k: int = 16
    d_index: int | None = None
    local_blocks: int = 1
    sink_blocks: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        for name, least in (
            ("block_size", 1),
            ("top_k", 1),
            ("local_blocks", 0),
            ("sink_blocks", 0),
        ):
            _whole(name, getattr(self, name), least)
        if self.d_index is not None:
            _whole("d_index", self.d_index, 1)
        if self.local_blocks + self.sink_blocks > self.top_k:
            raise ValueError(
                f"top_k={self.top_k} cannot hold local_blocks={self.local_blocks} + "
                f"sink_blocks={self.sink_blocks}; raise top_k or force fewer blocks"
            )
        if self.layers is not None:
            layers = tuple(self.layers)
            for layer in layers:
                _whole("layers", layer, 0)
            if len(set(layers)) != len(layers):
                raise ValueError(f"layers must not repeat, got {layers}")
            object.__setattr__(self, "layers", tuple(sorted(layers)))


def _whole(name: str, number: int, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")


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
    """MSA of one layer: q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value], q_index [b, t, g,
    di], k_index [b, s, di].

    phase "dense": dense attention, the index is not used. "warmup": dense attention and the loss
    over the whole prefix. "sparse": select, attend, and the loss over the selected blocks. q, k, v
    get their gradient from `out` only, q_index and k_index from `index_loss` only. Raises
    ValueError for an unknown phase and arguments that do not fit together.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "backend": backend}
    selection = None
    if phase == "sparse":
        selection = select_blocks(
            q_index,
            k_index,
            block_size=block_size,
            top_k=top_k,
            local_blocks=local_blocks,
            sink_blocks=sink_blocks,
            index_scale=index_scale,
            **packed,
        )
        out, lse = sparse_attention(q, k, v, selection, scale=scale, return_lse=True, **packed)
    else:
        out, lse = dense_attention(q, k, v, scale=scale, return_lse=True, **packed)
    loss = None
    if with_index_loss and phase != "dense":
        loss = index_loss(
            q,
            k,
            q_index,
            k_index,
            selection,
            scale=scale,
            index_scale=index_scale,
            row_weights=row_weights,
            lse=lse,
            **packed,
        )
    return MSAOutput(out, loss, selection, lse)
