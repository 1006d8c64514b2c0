"""index_loss: how far the index is from the attention that it must predict."""

from __future__ import annotations

from torch import Tensor

from openmsa.ops import backend as backends
from openmsa.ops import checks
from openmsa.ops.index_loss import cpu, portable, reference, triton
from openmsa.ops.workspace import no_autocast
from openmsa.selection import Selection

_BACKENDS = {"reference": reference, "portable": portable, "cpu": cpu, "triton": triton}


def index_loss(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    selection: Selection | None = None,
    *,
    scale: float | None = None,
    index_scale: float | None = None,
    row_weights: Tensor | None = None,
    lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL(attention || index), averaged over query tokens and groups (MSA eqs. 9-10).

    q [b, t, h, d] and k [b, s, g, d] are the teacher and get no gradient; q_index [b, t, g,
    d_index] and k_index [b, s, d_index] are the student. Support of both softmaxes: the visible
    keys of the selected blocks (`selection` with 1 or g groups) or of the whole prefix (`selection`
    None: the warm-up phase). row_weights [b, t]: weight of each query token in the average, 1 if
    absent; constants. All zero: loss 0. lse [b, t, h]: the lse that attention returned on this same
    support, if at hand; saves a pass, changes nothing else. scale, index_scale: default 1 / sqrt of
    d and of d_index. Packed sequences: see sparse_attention.

    Returns a scalar, fp32 (fp64 for fp64 inputs), with gradients for q_index and k_index only.
    Raises ValueError for arguments that do not fit together.
    """
    q, k = checks.autocast(q.detach(), k.detach())
    q_index, k_index = checks.one_dtype(q_index, k_index)
    checks.shapes(q=(q, "b t h d"), k=(k, "b s g d"))
    checks.shapes(q_index=(q_index, "b t g d_index"), k_index=(k_index, "b s d_index"))
    checks.index_belongs(q, k, q_index, k_index)
    checks.heads(q, k)
    if selection is not None:
        checks.selection(selection, q, (1, k.shape[2]))
    checks.per_query("row_weights", row_weights, tuple(q.shape[:2]), q)
    checks.per_query("lse", lse, tuple(q.shape[:3]), q)
    scale = checks.scale_or_default("scale", scale, q.shape[-1])
    index_scale = checks.scale_or_default("index_scale", index_scale, q_index.shape[-1])
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    run = _BACKENDS[backends.choose(backend, q.device, q.dtype, q_index.dtype)].index_loss
    with no_autocast(q):
        return run(
            q,
            k,
            q_index,
            k_index,
            None if selection is None else selection.blocks,
            block_size=1 if selection is None else selection.block_size,
            scale=scale,
            index_scale=index_scale,
            row_weights=None if row_weights is None else row_weights.detach(),
            lse=None if lse is None else lse.detach(),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
