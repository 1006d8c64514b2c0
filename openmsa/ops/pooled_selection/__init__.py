"""pooled_selection: which blocks a query reads, scored by keys that each stand for a window."""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.ops import backend as backends
from openmsa.ops import checks
from openmsa.ops.pooled_selection import portable, reference
from openmsa.ops.pooled_selection.windows import mean_pool, num_windows, window_borders
from openmsa.ops.workspace import no_autocast
from openmsa.selection import Selection

__all__ = ["mean_pool", "num_windows", "pooled_selection", "window_borders"]

# There are no kernels of its own for the CPU or a GPU yet: torch's products do most of the work.
_BACKENDS = {
    "reference": reference,
    "portable": portable,
    "cpu": portable,
    "triton": portable,
}


def pooled_selection(
    q: Tensor,
    k_pooled: Tensor,
    *,
    num_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    sink_blocks: int = 0,
    score: str = "softmax",
    pool: str = "max",
    per_head: bool = False,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Keep, per query token and KV group (or head), the forced blocks and then those whose windows
    score best.

    q [b, t, h, d]; k_pooled [b, n, g, d], a key for every window of `kernel` tokens, one beginning
    every `stride` tokens, that lies wholly within its sequence (packed: one after the other, as
    `window_borders` counts them; more rows are ignored). Queries are the last t of the num_keys
    keys; a window is visible once its last token is. score: "dot", the fp32 product times `scale`
    (default 1 / sqrt(d)), or "softmax" of it over the visible windows. It is summed over the heads
    of a group unless per_head. A block is worth the best ("max") of the windows that overlap it, or
    the "sum" of their softmax scores, each times the part of its tokens in the block; none is
    visible: least of all. Forced blocks, ties, NaN and cu_seqlens (which count tokens) are as in
    `select_blocks`. "cpu" and "triton" run the portable code, which reads the lengths of packed
    sequences and so waits for a GPU.

    Returns a Selection with blocks int32 [b, g or h, t, top_k], ascending, -1 at the end, without
    gradient. Raises ValueError for arguments that do not fit together.
    """
    q, k_pooled = checks.one_dtype(q.detach(), k_pooled.detach())
    sizes = {"num_keys": num_keys, "kernel": kernel, "stride": stride, "block_size": block_size}
    _check_tensors(q, k_pooled, **sizes)
    checks.positive(top_k=top_k)
    checks.forced(local_blocks, sink_blocks, top_k)
    _check_scores(score, pool)
    scale = checks.scale_or_default("scale", scale, q.shape[-1])
    borders = _check_borders(q, k_pooled, cu_seqlens_q, cu_seqlens_k, num_keys, kernel, stride)
    run = _BACKENDS[backends.choose(backend, q.device, q.dtype)].pooled_selection
    rule = {"top_k": top_k, "local_blocks": local_blocks, "sink_blocks": sink_blocks}
    how = {"softmax": score == "softmax", "pool": pool, "per_head": per_head, "scale": scale}
    with no_autocast(q):
        return Selection(run(q, k_pooled, **sizes, **rule, **how, **borders), block_size)


def _check_tensors(q, k_pooled, num_keys, kernel, stride, block_size):
    checks.shapes(q=(q, "b t h d"), k_pooled=(k_pooled, "b n g d"))
    checks.heads(q, k_pooled)
    checks.positive(kernel=kernel, stride=stride, block_size=block_size)
    checks.whole("num_keys", num_keys, 0)
    checks.windows(kernel, stride, block_size)


def _check_scores(score: str, pool: str) -> None:
    if score not in ("softmax", "dot"):
        raise ValueError(f"score must be 'softmax' or 'dot', got {score!r}")
    if pool not in ("max", "sum"):
        raise ValueError(f"pool must be 'max' or 'sum', got {pool!r}")
    if pool == "sum" and score == "dot":
        raise ValueError("pool='sum' adds up softmax scores; with score='dot' use pool='max'")


def _check_borders(q, k_pooled, cu_seqlens_q, cu_seqlens_k, num_keys, kernel, stride):
    """Both cu_seqlens; the keys themselves are not here, only their number."""
    keys = torch.empty(1, num_keys, device="meta")
    cu_seqlens_q, cu_seqlens_k = checks.sequences(q, keys, cu_seqlens_q, cu_seqlens_k)
    rows = k_pooled.shape[1]
    if cu_seqlens_k is None:
        wanted = num_windows(num_keys, kernel, stride)
    elif checks.readable(cu_seqlens_k):
        wanted = int(window_borders(cu_seqlens_k, kernel, stride)[-1])
    else:
        wanted = 0
    if rows < wanted or (cu_seqlens_k is None and rows > wanted):
        raise ValueError(
            f"k_pooled has {rows} windows, but {num_keys} keys have {wanted} of kernel={kernel}, "
            f"stride={stride}; see mean_pool"
        )
    return {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
