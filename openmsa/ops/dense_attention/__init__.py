"""dense_attention: exact causal softmax attention over every visible key."""

from __future__ import annotations

from torch import Tensor

from openmsa.ops import backend as backends
from openmsa.ops import checks
from openmsa.ops.dense_attention import cpu, portable, reference, triton
from openmsa.ops.workspace import no_autocast

_BACKENDS = {"reference": reference, "portable": portable, "cpu": cpu, "triton": triton}


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention of every query over all its visible keys.

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value]; head i belongs to KV head i // (h / g).
    Queries are the last t of the s keys of their sequence. scale: default 1 / sqrt(d). Packed
    sequences: batch 1, cu_seqlens_q and cu_seqlens_k int32 [sequences + 1]; their contents are
    checked on the CPU only.

    Returns out [b, t, h, d_value] and, with `return_lse`, the natural log of the sum of
    exponentiated scaled scores, fp32 [b, t, h], which carries no gradient. Raises ValueError for
    arguments that do not fit together.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.shapes(q=(q, "b t h d"), k=(k, "b s g d"), v=(v, "b s g d_value"))
    checks.heads(q, k)
    scale = checks.scale_or_default("scale", scale, q.shape[-1])
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    run = _BACKENDS[backends.choose(backend, q.device, q.dtype)].dense_attention
    with no_autocast(q):
        out, lse = run(q, k, v, scale=scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return (out, lse.detach()) if return_lse else out
