"""InfLLM-V2, dense-sparse switchable attention (arXiv 2509.24663), in our letters, g = h // r.

K[w, g]    = mean over the 32 tokens s of kernel w of k[s, g]       a kernel begins every 16 tokens
P[t, w, h] = softmax over the kernels w behind t of (q[t, h] . K[w, g] / sqrt(d))
M[t, n, g] = max over the kernels w that overlap block n of (sum over the group's h of P[t, w, h])
S[t, g]    = the first block, the query's latest blocks, then the best others of M, k in all
O[t, h]    = softmax over s in S[t, g] of (q[t, h] . k[s, g] / sqrt(d)) @ v[s, g]

Scored: kernels, means of keys. Shared: a selection by the heads of a group. Trained by: the
language model's loss alone, through the attention; there are no parameters beside those of dense
attention, and the choice passes no gradient. Remembered: k and v; a cache may also keep the mean of
every whole kernel, k_pooled, which is otherwise made of all of k at every call.

A sequence of fewer than `dense_below` keys is attended to densely. What a query reads thus depends
on the length of its sequence: a prompt read at once and the same prompt token by token agree only
beyond that length, or with dense_below=0. Packed sequences switch one by one.

Where paper and code disagree: the official `topk` of 64 counts the first block but not the 32
latest, which its kernel adds as a window of blocks; here top_k counts every block, 96. The code
estimates the sum in the softmax of P from coarser kernels (of 128 tokens, every 64), for speed;
here it is exact, as in the equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.ops import checks
from openmsa.ops.dense_attention import dense_attention
from openmsa.ops.pooled_selection import mean_pool, pooled_selection, window_borders
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.selection import Selection


@dataclass(frozen=True)
class InfLLM2Config:
    """The numbers of InfLLM-V2: tokens (kernel, stride, block_size, dense_below) and blocks.

    Kernels of `kernel` tokens begin every `stride`. The local_blocks latest and the sink_blocks
    first blocks are always kept, within top_k. Sequences of fewer than dense_below keys are dense;
    0: none. layers: which layers are sparse, None for all. The defaults are those of MiniCPM4.
    Raises ValueError for numbers that contradict each other.
    """

    kernel: int = 32
    stride: int = 16
    block_size: int = 64
    top_k: int = 96
    local_blocks: int = 32
    sink_blocks: int = 1
    dense_below: int = 8192
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        sizes = {"kernel": self.kernel, "stride": self.stride, "block_size": self.block_size}
        checks.positive(**sizes, top_k=self.top_k)
        checks.windows(**sizes)
        checks.forced(self.local_blocks, self.sink_blocks, self.top_k)
        checks.whole("dense_below", self.dense_below, 0)
        object.__setattr__(self, "layers", checks.layers(self.layers))


REMEMBERS = ("k", "v")


def select(
    config: InfLLM2Config,
    q: Tensor,
    k: Tensor,
    *,
    k_pooled: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """q [b, t, h, d], k [b, s, g, d] -> blocks [b, g, t, k], whatever the sequences' lengths.

    k_pooled [b, n, g, d]: what `mean_pool` makes of k, if known.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    kernels = {"kernel": config.kernel, "stride": config.stride}
    if k_pooled is None:
        k_pooled, _ = mean_pool(k, **kernels, cu_seqlens_k=cu_seqlens_k)
    return pooled_selection(
        q,
        k_pooled,
        num_keys=k.shape[1],
        **kernels,
        block_size=config.block_size,
        top_k=config.top_k,
        local_blocks=config.local_blocks,
        sink_blocks=config.sink_blocks,
        score="softmax",
        pool="max",
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        backend=backend,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None,
    *,
    scale: float | None = None,
    **where,
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value] -> out [b, t, h, d_value], lse

    Without a selection, over every visible key. where: cu_seqlens_q, cu_seqlens_k and backend, as
    in the operations.
    """
    if selection is None:
        return dense_attention(q, k, v, scale=scale, return_lse=True, **where)
    return sparse_attention(q, k, v, selection, scale=scale, return_lse=True, **where)


def loss() -> None:
    """Blocks are chosen by the keys themselves, so nothing has to be taught."""


PHASES = ("dense", "sparse")


@dataclass(frozen=True, eq=False)
class InfLLM2Output:
    """out [b, t, h, d_value]; index_loss None; selection; lse fp32 [b, t, h].

    selection is None if every sequence was dense; dense ones among sparse ones have empty rows.
    """

    out: Tensor
    index_loss: None
    selection: Selection | None
    lse: Tensor


def infllm2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: InfLLM2Config,
    *,
    k_pooled: Tensor | None = None,
    phase: str = "sparse",
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> InfLLM2Output:
    """The attention of one InfLLM-V2 layer.

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value]; queries are the last t of the s keys.
    Phases: "dense" (dense attention), "sparse" (select and attend in sequences of at least
    config.dense_below keys, dense attention in the others). Packed sequences: batch 1 with
    cu_seqlens_q and cu_seqlens_k int32 [sequences + 1]; the phase "sparse" reads their lengths,
    which waits for a GPU unless dense_below is 0. k_pooled [b, n, g, d]: the mean of every whole
    kernel (`mean_pool`), if known; made of k if left out.

    Raises ValueError for an unknown phase and for arguments that do not fit together.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    borders = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    long = [phase == "sparse"]
    if long == [True] and config.dense_below > 0:
        lengths = [k.shape[1]] if borders[1] is None else borders[1].diff().tolist()
        long = [length >= config.dense_below for length in lengths]
    if any(long) and not all(long):
        return _some_of_each(q, k, v, k_pooled, config, long, scale, borders, backend)
    where = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), borders, strict=True), backend=backend)
    how = {"k_pooled": k_pooled, "scale": scale}
    selection = select(config, q, k, **how, **where) if all(long) else None
    out, lse = attend(q, k, v, selection, scale=scale, **where)
    return InfLLM2Output(out, None, selection, lse)


def _some_of_each(q, k, v, k_pooled, config, long, scale, borders, backend):
    """Packed sequences of which some are sparse, `long`, and some dense."""
    long = torch.tensor(long, device=q.device)
    if k_pooled is not None:
        windows = window_borders(borders[1], config.kernel, config.stride)
        k_pooled = k_pooled[:, _sequences(long, windows)[0]]
    places, outs, lses, rows = [], [], [], []
    for sparse in (True, False):
        (here, cu_q), (keys, cu_k) = (_sequences(long == sparse, x) for x in borders)
        q_here, k_here, v_here = q[:, here], k[:, keys], v[:, keys]
        where = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "backend": backend}
        how = {"k_pooled": k_pooled, "scale": scale}
        selection = select(config, q_here, k_here, **how, **where) if sparse else None
        out, lse = attend(q_here, k_here, v_here, selection, scale=scale, **where)
        empty = torch.full((1, k.shape[2], len(here), config.top_k), -1, device=q.device)
        places.append(here)
        outs.append(out)
        lses.append(lse)
        rows.append(selection.blocks if sparse else empty.to(torch.int32))
    order = torch.cat(places).argsort()
    blocks = torch.cat(rows, 2)[:, :, order]
    out, lse = torch.cat(outs, 1)[:, order], torch.cat(lses, 1)[:, order]
    return InfLLM2Output(out, None, Selection(blocks, config.block_size), lse)


def _sequences(wanted: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the wanted sequences, and the borders of those alone."""
    lengths = borders.diff()
    tokens = wanted.repeat_interleave(lengths).nonzero()[:, 0]
    own = lengths[wanted].cumsum(0, dtype=torch.int32)
    return tokens, torch.nn.functional.pad(own, (1, 0))
