"""window_attention: exact softmax attention over the latest tokens and the first few."""

from __future__ import annotations

from torch import Tensor

from openmsa.ops import backend as backends
from openmsa.ops import checks
from openmsa.ops.window_attention import portable, reference
from openmsa.ops.workspace import no_autocast

# Neither set of kernels has one for a band: both names are served by torch's matrix products.
_BACKENDS = {"reference": reference, "portable": portable, "cpu": portable, "triton": portable}


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the `window` latest of its visible keys, its own among
    them, and over the first `sinks` (StreamingLLM, arXiv 2309.17453, without moving positions).

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value]; head i belongs to KV head i // (h / g).
    Queries are the last t of the s keys of their sequence; the query at position p reads key j <= p
    where j > p - window or j < sinks, counted in tokens. scale: default 1 / sqrt(d). Packed
    sequences: batch 1, cu_seqlens_q and cu_seqlens_k int32 [sequences + 1]; their contents are
    checked on the CPU only. Work grows with t * (window + sinks). The backends "cpu" and "triton"
    run what "portable" runs: no native kernel knows a band.

    Returns out [b, t, h, d_value] and, with `return_lse`, the natural log of the sum of
    exponentiated scaled scores, fp32 [b, t, h], which carries no gradient. Raises ValueError for
    arguments that do not fit together.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.shapes(q=(q, "b t h d"), k=(k, "b s g d"), v=(v, "b s g d_value"))
    checks.heads(q, k)
    checks.positive(window=window)
    checks.whole("sinks", sinks, 0)
    scale = checks.scale_or_default("scale", scale, q.shape[-1])
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    run = _BACKENDS[backends.choose(backend, q.device, q.dtype)].window_attention
    reach = {"window": window, "sinks": sinks, "scale": scale}
    with no_autocast(q):
        out, lse = run(q, k, v, **reach, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return (out, lse.detach()) if return_lse else out
