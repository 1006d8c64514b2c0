"""DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556), equations 1 to 4 in our letters.

I[t, s] = sum over j of w[t, j] * relu(q_index[t, j] . k_index[s])   j: index heads; a shared key
S[t]    = the k visible tokens s of highest I, one choice for all heads; nothing is kept by force
O[t, h] = softmax over s in S[t] of (q[t, h] . k[s, g] * scale) @ v[s, g],     g = h // r
loss    = mean over t of KL(P[t] || softmax(I[t])),   P = sum over h of softmax(q k), L1-normalised
          both over s in S[t]; over every visible s while the index warms up

Scored: single tokens, by a learned index. Shared: one choice by all heads of a query, one index key
by all index heads. Trained by: the loss, which reaches q_index, k_index and w only; so that the
index learns from nothing else, its inputs are detached from the model. Remembered: k, v and
k_index; a cache of MLA in its MQA form is one KV head, k [b, s, 1, 576] the latent and its rotary
part, v the first 512 channels of k.

Where paper and code differ: the paper has no scale in I. DeepSeek's code multiplies by
1 / sqrt(d_index) and by 1 / sqrt(index heads), and that is followed: it chooses alike, but the
loss is a softmax of I. Code scores in fp8 after a Hadamard rotation; here scores are fp32, and a
rotation would change none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openmsa.ops import checks
from openmsa.ops.dense_attention import dense_attention
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.ops.token_selection import select_tokens, token_index_loss
from openmsa.selection import Selection


@dataclass(frozen=True)
class DSAConfig:
    """The numbers of DSA: tokens kept (top_k), heads (index_heads) and channels (d_index).

    layers: which layers are sparse, None for all. Raises ValueError for numbers that make no sense.
    """

    top_k: int = 2048
    index_heads: int = 64
    d_index: int = 128
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        checks.positive(top_k=self.top_k, index_heads=self.index_heads, d_index=self.d_index)
        object.__setattr__(self, "layers", checks.layers(self.layers))


REMEMBERS = ("k", "v", "k_index")


def select(
    config: DSAConfig, q_index: Tensor, k_index: Tensor, head_weights: Tensor, **how
) -> Selection:
    """q_index [b, t, index_heads, d_index], k_index [b, s, d_index], head_weights [b, t,
    index_heads] -> tokens [b, 1, t, k], as blocks of one.

    how, here and below: scales, cu_seqlens_q, cu_seqlens_k and backend, as in the operations.
    """
    return select_tokens(q_index, k_index, head_weights, top_k=config.top_k, **how)


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
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    selection: Selection | None,
    **how,
) -> Tensor:
    """The index against the attention it predicts, on the support that attention had; a scalar."""
    return token_index_loss(q, k, q_index, k_index, head_weights, selection, **how)


PHASES = ("dense", "warmup", "sparse")


@dataclass(frozen=True, eq=False)
class DSAOutput:
    """out [b, t, h, d_value]; index_loss scalar or None; selection or None; lse fp32 [b, t, h]."""

    out: Tensor
    index_loss: Tensor | None
    selection: Selection | None
    lse: Tensor


def dsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    config: DSAConfig,
    *,
    phase: str = "sparse",
    scale: float | None = None,
    index_scale: float | None = None,
    row_weights: Tensor | None = None,
    with_index_loss: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> DSAOutput:
    """The attention of one DSA layer, and what its index has to learn from it.

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value], q_index [b, t, index_heads, d_index],
    k_index [b, s, d_index], head_weights [b, t, index_heads]; queries are the last t of the s keys.
    Phases: "dense" (dense attention, index unused), "warmup" (dense attention, loss over the whole
    prefix), "sparse" (select, attend, loss over the selected tokens). q, k, v get gradient from
    `out` only, q_index, k_index and head_weights from `index_loss` only. row_weights [b, t] weigh
    query tokens in the loss. Packed: batch 1, cu_seqlens_q and cu_seqlens_k int32 [sequences + 1].
    Raises ValueError for an unknown phase and for arguments that do not fit together.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    where = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "backend": backend}
    index = (q_index, k_index, head_weights)
    selection = kl = None
    if phase == "sparse":
        selection = select(config, *index, index_scale=index_scale, **where)
    out, lse = attend(q, k, v, selection, scale=scale, **where)
    if with_index_loss and phase != "dense":
        how = {"scale": scale, "index_scale": index_scale, "row_weights": row_weights}
        kl = loss(q, k, *index, selection, **how, **where)
    return DSAOutput(out, kl, selection, lse)
