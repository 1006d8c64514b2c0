"""select_tokens and token_index_loss: DeepSeek's lightning indexer, and what it learns from.

I[t, s] = index_scale * sum over j of head_weights[t, j] * relu(q_index[t, j] . k_index[s])

There are no native kernels for it yet: `cpu` and `triton` run the code of `portable`, on the
devices and dtypes that these backends take.
"""

from __future__ import annotations

from torch import Tensor

from openmsa.ops import backend as backends
from openmsa.ops import checks
from openmsa.ops.token_selection import portable, portable_loss, reference
from openmsa.ops.workspace import no_autocast
from openmsa.selection import Selection


def select_tokens(
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    *,
    top_k: int = 2048,
    index_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Keep, per query token, the key tokens with the highest index score (DSA eqs. 1-2).

    q_index [b, t, index heads, d_index]; k_index [b, s, d_index]: one key for all index heads;
    head_weights [b, t, index heads], of any floating dtype and either sign. Queries are the last t
    of the s keys of their sequence; a key is visible up to the query's own position, and nothing is
    always kept. Scores are fp32. index_scale: default 1 / sqrt(d_index * index heads), as in
    DeepSeek's code; unless negative it changes no choice. Equal scores go to the lower token, NaN
    counts as the lowest score. Fewer visible tokens than top_k: all of them. Packed sequences:
    batch 1, cu_seqlens_q and cu_seqlens_k int32 [sequences + 1].

    Returns a Selection with blocks of one token and one group for all heads, int32 [b, 1, t,
    top_k], ascending, -1 at the end. It carries no gradient. Raises ValueError for arguments that
    do not fit together.
    """
    q_index, k_index = checks.one_dtype(q_index.detach(), k_index.detach())
    index_scale = _index_belongs(q_index, k_index, head_weights, index_scale)
    checks.positive(top_k=top_k)
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q_index, k_index, cu_seqlens_q, cu_seqlens_k)
    chosen = backends.choose(backend, q_index.device, q_index.dtype, index=True)
    run = (reference if chosen == "reference" else portable).select_tokens
    rule = {"top_k": top_k, "index_scale": index_scale}
    where = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    with no_autocast(q_index):
        tokens = run(q_index, k_index, head_weights.detach(), **rule, **where)
    return Selection(tokens[:, None], 1)


def token_index_loss(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    head_weights: Tensor,
    selection: Selection | None = None,
    *,
    scale: float | None = None,
    index_scale: float | None = None,
    row_weights: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL(attention || softmax of the index scores), averaged over query tokens (DSA eqs. 3-4).

    q [b, t, h, d] and k [b, s, g, d] are the teacher and get no gradient: every head's softmax on
    the support, summed over all h heads and divided by its sum. q_index, k_index, head_weights and
    index_scale as in select_tokens are the student. Support of both: the selected tokens
    (`selection` of one group) or the whole visible prefix (`selection` None: the warm-up phase).
    row_weights [b, t]: weight of each query token in the average, 1 if absent; constants. All zero:
    loss 0. scale: default 1 / sqrt(d). Packed sequences: see select_tokens.

    Returns a scalar, fp32 (fp64 for fp64 inputs), with gradients for q_index, k_index and
    head_weights only. Raises ValueError for arguments that do not fit together.
    """
    q, k = checks.autocast(q.detach(), k.detach())
    q_index, k_index = checks.one_dtype(q_index, k_index)
    checks.shapes(q=(q, "b t h d"), k=(k, "b s g d"))
    checks.heads(q, k)
    index_scale = _index_belongs(q_index, k_index, head_weights, index_scale)
    for name, tokens, wanted in (("q_index", q_index, q), ("k_index", k_index, k)):
        if tokens.shape[:2] != wanted.shape[:2] or tokens.device != wanted.device:
            raise ValueError(
                f"{name} must have the {tuple(wanted.shape[:2])} batch and tokens of "
                f"{name[0]} on {wanted.device}, got {tuple(tokens.shape[:2])} on {tokens.device}"
            )
    if selection is not None:
        checks.selection(selection, q, (1,))
    checks.per_query("row_weights", row_weights, tuple(q.shape[:2]), q)
    scale = checks.scale_or_default("scale", scale, q.shape[-1])
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    chosen = backends.choose(backend, q.device, q.dtype, q_index.dtype)
    run = (reference if chosen == "reference" else portable_loss).token_index_loss
    with no_autocast(q):
        return run(
            *(q, k, q_index, k_index, head_weights),
            None if selection is None else selection.blocks,
            block_size=1 if selection is None else selection.block_size,
            scale=scale,
            index_scale=index_scale,
            row_weights=None if row_weights is None else row_weights.detach(),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )


def _index_belongs(q_index, k_index, head_weights, index_scale) -> float:
    """Index queries, keys and weights fit; the scale, or the default for these sizes."""
    checks.shapes(q_index=(q_index, "b t index_heads d_index"), k_index=(k_index, "b s d_index"))
    if min(q_index.shape[2:]) < 1:
        raise ValueError(
            f"q_index must have at least 1 index head of 1 channel, got {tuple(q_index.shape)}"
        )
    checks.shapes(head_weights=(head_weights, "b t index_heads"))
    checks.per_query("head_weights", head_weights, tuple(q_index.shape[:3]), q_index)
    return checks.scale_or_default("index_scale", index_scale, q_index.shape[2] * q_index.shape[3])
