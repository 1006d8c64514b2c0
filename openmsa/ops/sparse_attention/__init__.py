"""sparse_attention: exact softmax attention over the selected blocks."""

from __future__ import annotations

from torch import Tensor

from openmsa.ops import backend as backends
from openmsa.ops import checks
from openmsa.ops.sparse_attention import cpu, portable, reference, triton
from openmsa.ops.workspace import no_autocast
from openmsa.selection import Selection

_BACKENDS = {"reference": reference, "portable": portable, "cpu": cpu, "triton": triton}


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the visible keys of its selected blocks (MSA eq. 8).

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value]; head i belongs to KV head i // (h / g).
    `selection` has 1, g or h groups. Queries are the last t of the s keys of their sequence. scale:
    default 1 / sqrt(d). Empty slots (-1), blocks outside the sequence and repeated blocks add
    nothing. Blocks with no more tokens than the selection's groups have heads, such as single
    tokens, are gathered query by query: by torch on `portable` and `triton`. Packed sequences:
    batch 1, cu_seqlens_q and cu_seqlens_k int32 [sequences + 1]; checked on the CPU only.

    Returns out [b, t, h, d_value] and, with `return_lse`, the natural log of the sum of
    exponentiated scaled scores, fp32 [b, t, h]. A query with nothing selected has output 0, lse
    -inf and gradient 0. lse carries no gradient. Raises ValueError for arguments that do not fit
    together.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.shapes(q=(q, "b t h d"), k=(k, "b s g d"), v=(v, "b s g d_value"))
    checks.heads(q, k)
    checks.selection(selection, q, (1, k.shape[2], q.shape[2]))
    scale = checks.scale_or_default("scale", scale, q.shape[-1])
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    run = _BACKENDS[backends.choose(backend, q.device, q.dtype)].sparse_attention
    with no_autocast(q):
        out, lse = run(
            q,
            k,
            v,
            selection.blocks,
            block_size=selection.block_size,
            scale=scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    return (out, lse.detach()) if return_lse else out
