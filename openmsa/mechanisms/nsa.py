"""Native Sparse Attention (arXiv 2502.11089), equations 5 to 12 in our letters, g = h // r.

K[j, g]     = sum over i < kernel of softmax(w)[i] * k[j * stride + i, g]      V[j, g] likewise
P[t, h, j]  = softmax over windows j that end at or before t of q[t, h] . K[j, g] / sqrt(d)
M[t, g, n]  = sum over the group's h, and over j by how much of window j lies in block n, of P
S[t, g]     = the first block, the two latest, then the best others of M, k in all
O[t, h]     = gates[t, h, 0] * sum over j of P[t, h, j] V[j, g]                        compressed
            + gates[t, h, 1] * softmax attention over the visible tokens of S[t, g]    selected
            + gates[t, h, 2] * softmax attention over the latest `window` tokens       window
A branch in which a query sees nothing gives 0.

Scored: blocks, by the compressed attention that is computed anyway. Shared: a choice by the heads
of a group. Trained by: the model's own loss, end to end. It reaches q, k, v, gates and the weights
w; a choice itself passes nothing on, so scores learn through the compressed branch alone.
Remembered: k and v; a cache may also keep K and V, which never change once their window is full.

Where others differ: the paper maps a window to its K and V by an MLP with position encodings, here
by a weight per position and channel, which begins as the mean (the mean is what fla takes). The
paper gives each branch keys and values of its own; we follow fla and every conversion: one set for
all, taken after rotary embedding. Another set for the window may be passed. Equation 9 is read with
block n counted from 0 and windows that straddle two blocks counted in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from openmsa.ops import checks
from openmsa.ops.dense_attention import dense_attention
from openmsa.ops.pooled_selection import num_windows, pooled_selection, window_borders
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.ops.window_attention import window_attention
from openmsa.ops.workspace import accumulate_dtype, no_autocast, rows_at_once
from openmsa.selection import Selection


@dataclass(frozen=True)
class NSAConfig:
    """The numbers of NSA: tokens (kernel, stride, block_size, window) and blocks (top_k, *_blocks).

    kernel, stride: a window that becomes one key has kernel tokens, the next begins stride tokens
    later. local_blocks latest and sink_blocks first blocks are always kept, within top_k. layers:
    which layers are sparse, None for all. Raises ValueError for numbers that contradict each other.
    """

    kernel: int = 32
    stride: int = 16
    block_size: int = 64
    top_k: int = 16
    window: int = 512
    local_blocks: int = 2
    sink_blocks: int = 1
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("kernel", "stride", "block_size", "top_k", "window"):
            checks.whole(name, getattr(self, name), 1)
        checks.forced(self.local_blocks, self.sink_blocks, self.top_k)
        for name in ("kernel", "block_size"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of stride={self.stride}"
                )
        object.__setattr__(self, "layers", checks.layers(self.layers))


REMEMBERS = ("k", "v")


def compress(
    x: Tensor, weights: Tensor, config: NSAConfig, *, cu_seqlens_k: Tensor | None = None
) -> Tensor:
    """x [b, s, g, d] keys or values, weights [kernel, g, d] -> one for every window, [b, n, g, d].

    weights: logits over the positions of a window, for every channel; zeros are the mean. Windows
    lie wholly within their sequence; those of packed sequences follow each other. Sums are fp32.
    Raises ValueError for weights of another shape.
    """
    checks.shapes(x=(x, "b s g d"))
    if weights.shape != (config.kernel, *x.shape[2:]):
        raise ValueError(
            f"weights must be [kernel, g, d] = {(config.kernel, *x.shape[2:])}, "
            f"got shape {tuple(weights.shape)}"
        )
    with no_autocast(x):
        share = weights.to(accumulate_dtype(x)).softmax(0)
        sequences = [x] if cu_seqlens_k is None else x.split(cu_seqlens_k.diff().tolist(), 1)
        return torch.cat([_windows(y, share, config.stride) for y in sequences], 1)


def _windows(x: Tensor, share: Tensor, stride: int) -> Tensor:
    """x [b, s, g, d] of one sequence, share [kernel, g, d] -> sums over its windows [b, n, g, d].

    Tokens are cut into strides. Each gives to every window that it lies in one part.
    """
    b, s, g, d = x.shape
    n = num_windows(s, len(share), stride)
    share = share.unflatten(0, (-1, stride))
    strides = x[:, : (n + len(share) - 1) * stride if n else 0].unflatten(1, (-1, stride))
    at_once = rows_at_once(12 * max(1, b * stride * g * d), x.device)
    parts = [
        torch.stack([(some.to(share.dtype) * part).sum(2) for part in share])
        for some in strides.split(at_once, 1)
    ]
    parts = torch.cat(parts, 2)
    return sum(part[:, i : i + n] for i, part in enumerate(parts)).to(x.dtype)


def select(config: NSAConfig, q: Tensor, k_compressed: Tensor, num_keys: int, **how) -> Selection:
    """q [b, t, h, d], k_compressed [b, n, g, d] of num_keys tokens -> blocks [b, g, t, k].

    how: scale, cu_seqlens_q, cu_seqlens_k (of tokens) and backend, as in `pooled_selection`.
    """
    return pooled_selection(
        q,
        k_compressed,
        num_keys=num_keys,
        kernel=config.kernel,
        stride=config.stride,
        block_size=config.block_size,
        top_k=config.top_k,
        local_blocks=config.local_blocks,
        sink_blocks=config.sink_blocks,
        score="softmax",
        pool="sum",
        **how,
    )


def attend(
    config: NSAConfig,
    q: Tensor,
    kv: Sequence[Tensor],
    kv_compressed: Sequence[Tensor],
    kv_window: Sequence[Tensor],
    gates: Tensor,
    selection: Selection,
    **how,
) -> Tensor:
    """q [b, t, h, d], gates [b, t, h, 3], keys and values of each branch -> out [b, t, h, d_value].

    how: scale, cu_seqlens_q, cu_seqlens_k and backend, as in the operations.
    """
    branches = (
        _attend_compressed(config, q, *kv_compressed, num_keys=kv[0].shape[1], **how),
        sparse_attention(q, *kv, selection, **how),
        window_attention(q, *kv_window, window=config.window, **how),
    )
    gates = gates.to(branches[0].dtype).unsqueeze(-1)
    return sum(gates[..., i, :] * branch for i, branch in enumerate(branches))


def _attend_compressed(
    config, q, k_compressed, v_compressed, *, num_keys, cu_seqlens_q, cu_seqlens_k, **how
) -> Tensor:
    """Attention over the windows that end at or before a query; 0 where there is none.

    The number of windows seen grows by one every `stride` tokens. Tokens that see equally many
    stand on one stair, as so many heads of one query, and stairs against windows are a plain causal
    triangle: dense attention.
    """
    (b, t, h, d), g = q.shape, k_compressed.shape[2]
    stairs = _stairs(config, t, num_keys, cu_seqlens_q, cu_seqlens_k, q.device)
    out = q.new_zeros(b, t, g, h // g, v_compressed.shape[3])
    if not stairs.count:
        return out.flatten(2, 3)
    place = slice(None), stairs.stair, stairs.step
    queries = q.new_zeros(b, stairs.count, g, stairs.width, h // g, d)
    queries.transpose(2, 3)[place] = q[:, stairs.tokens].unflatten(2, (g, -1))
    made = dense_attention(queries.flatten(2, 4), k_compressed, v_compressed, **stairs.where, **how)
    made = made.unflatten(2, queries.shape[2:5]).transpose(2, 3)[place]
    return out.index_copy(1, stairs.tokens, made).flatten(2, 3)


@dataclass(frozen=True, eq=False)
class _Stairs:
    """Where the query tokens that see a window stand: on `count` stairs of `width` steps.

    tokens, stair, step [m]: which tokens they are, and their places. where: cu_seqlens of packed
    sequences, counted in stairs and in windows.
    """

    tokens: Tensor
    stair: Tensor
    step: Tensor
    count: int
    width: int
    where: dict[str, Tensor]


def _stairs(config, t, s, cu_seqlens_q, cu_seqlens_k, device) -> _Stairs:
    stride, packed = config.stride, cu_seqlens_q is not None
    borders = cu_seqlens_q.tolist() if packed else [0, t]
    runs = []  # per sequence the first token that sees a window, its age since then, and the end
    for i, keys in enumerate(cu_seqlens_k.diff().tolist() if packed else [s]):
        begin, end = borders[i : i + 2]
        age = keys - (end - begin) - (config.kernel - 1)
        runs.append((min(end, max(begin, begin - age)), max(0, age), end))
    counts = [
        -(-(age % stride + end - first) // stride) if first < end else 0 for first, age, end in runs
    ]
    # Where no sequence needs a second stair, as in decoding, no step stays empty.
    single = max(counts) <= 1
    width = max(1, *(end - first for first, _, end in runs)) if single else stride
    tokens, place = [], []
    for (first, age, end), below in zip(runs, accumulate(counts, initial=0)):
        tokens.append(torch.arange(first, end, device=device))
        place.append(tokens[-1] - first + below * width + (0 if single else age % stride))
    tokens, place, where = torch.cat(tokens), torch.cat(place), {}
    if packed:
        stairs = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        windows = window_borders(cu_seqlens_k, config.kernel, stride)
        where = {"cu_seqlens_q": stairs, "cu_seqlens_k": windows}
    return _Stairs(tokens, place // width, place % width, sum(counts), width, where)


def loss() -> None:
    """The model's own loss teaches all there is: weights, gates and the scores that choose."""


PHASES = ("dense", "sparse")


@dataclass(frozen=True, eq=False)
class NSAOutput:
    """out [b, t, h, d_value]; index_loss None; selection or None; lse fp32 [b, t, h] of the phase
    "dense", else None: three softmaxes have no common one."""

    out: Tensor
    index_loss: None
    selection: Selection | None
    lse: Tensor | None


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_compressed: Tensor | None,
    v_compressed: Tensor | None,
    gates: Tensor,
    config: NSAConfig,
    *,
    kv_window: tuple[Tensor, Tensor] | None = None,
    phase: str = "sparse",
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> NSAOutput:
    """The attention of one NSA layer.

    q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value]; queries are the last t of the s keys.
    k_compressed and v_compressed [b, n, g, ...]: what `compress` makes of all s; the phase "dense"
    reads neither. gates [b, t, h, 3] in 0 ... 1 of the branches compressed, selected, window.
    kv_window: keys and values of the window, k and v if left out. Phases: "dense" (dense attention,
    k and v only), "sparse". Packed sequences: batch 1 with cu_seqlens_q and cu_seqlens_k int32
    [sequences + 1].

    Raises ValueError for an unknown phase and for arguments that do not fit together.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    where = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    how = {"scale": scale, "backend": backend}
    if phase == "dense":
        out, lse = dense_attention(q, k, v, return_lse=True, **where, **how)
        return NSAOutput(out, None, None, lse)
    q, *kv = checks.autocast(q, k, v)
    compressed = _given(k_compressed=k_compressed, v_compressed=v_compressed)
    how |= _checked(q, *kv, gates, **where)
    chosen = select(config, q, compressed[0], k.shape[1], **how)
    out = attend(config, q, kv, compressed, kv_window or kv, gates, chosen, **how)
    return NSAOutput(out, None, chosen, None)


def _given(**compressed: Tensor | None) -> tuple[Tensor, ...]:
    """As autocast wants them; raises ValueError for None."""
    for name, x in compressed.items():
        if x is None:
            raise ValueError(f"{name}=None will do in the phase 'dense' only; see compress")
    return checks.autocast(*compressed.values())


def _checked(q, k, v, gates, cu_seqlens_q, cu_seqlens_k) -> dict[str, Tensor | None]:
    """Both cu_seqlens; raises ValueError for what does not fit together."""
    checks.shapes(q=(q, "b t h d"), k=(k, "b s g d"), v=(v, "b s g d_value"))
    checks.heads(q, k)
    checks.per_query("gates", gates, (*q.shape[:3], 3), q)
    borders = checks.sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), borders))
