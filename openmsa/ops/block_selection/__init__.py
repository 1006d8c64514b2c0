"""select_blocks: which blocks of keys each query token and group will read."""

from __future__ import annotations

from torch import Tensor

from openmsa.ops import backend as backends
from openmsa.ops import checks
from openmsa.ops.block_selection import cpu, portable, reference, triton
from openmsa.ops.workspace import no_autocast
from openmsa.selection import Selection

_BACKENDS = {"reference": reference, "portable": portable, "cpu": cpu, "triton": triton}


def select_blocks(
    q_index: Tensor,
    k_index: Tensor,
    *,
    block_size: int = 128,
    top_k: int = 16,
    local_blocks: int = 1,
    sink_blocks: int = 0,
    index_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Keep, per query token and group, the forced blocks and then those with the highest scoring
    key (MSA eqs. 6-7).

    q_index [b, t, g, d_index]: one index query per group. k_index [b, s, d_index]: one index key
    for all groups. Queries are the last t of the s keys of their sequence; a key is visible up to
    the query's own position. Forced: the `local_blocks` latest blocks and the first `sink_blocks`;
    they use slots of `top_k`. index_scale multiplies the fp32 scores (default 1 / sqrt(d_index)).
    Equal scores go to the lower block number, NaN counts as the lowest score. Packed sequences:
    batch 1, cu_seqlens_q and cu_seqlens_k int32 [sequences + 1]; their contents are checked on the
    CPU only. float8_e4m3fn is read as it is: one scale for all keys belongs into index_scale, and
    scales of single queries change no choice.

    Returns a Selection with blocks int32 [b, g, t, top_k], ascending, -1 at the end. It carries no
    gradient. Raises ValueError for arguments that do not fit together.
    """
    q_index, k_index = checks.one_dtype(q_index.detach(), k_index.detach())
    checks.shapes(q_index=(q_index, "b t g d_index"), k_index=(k_index, "b s d_index"))
    checks.positive(block_size=block_size, top_k=top_k)
    checks.forced(local_blocks, sink_blocks, top_k)
    index_scale = checks.scale_or_default("index_scale", index_scale, q_index.shape[-1])
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q_index, k_index, cu_seqlens_q, cu_seqlens_k)
    chosen = backends.choose(backend, q_index.device, q_index.dtype, index=True)
    run = _BACKENDS[chosen].select_blocks
    with no_autocast(q_index):
        blocks = run(
            q_index,
            k_index,
            block_size=block_size,
            top_k=top_k,
            local_blocks=local_blocks,
            sink_blocks=sink_blocks,
            index_scale=index_scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    return Selection(blocks, block_size)
