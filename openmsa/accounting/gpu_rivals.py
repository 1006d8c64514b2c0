"""What else computes attention on a GPU: torch's fused kernels, FlexAttention, flash-msa, fla.

Each rival is a function without arguments; making or calling it raises where the rival is not
installed or refuses the shape, and the reason is for whoever measures to tell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from openmsa.accounting.inputs import Inputs
from openmsa.selection import Selection

FUSED = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FLEX_TILE = 128

Call = Callable[[], Tensor]


def heads_first(x: Inputs, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [b, heads, t, d], k and v with the KV heads of these: what SDPA takes, laid out for it."""
    r = x.q.shape[2] // x.k.shape[2]
    groups = -(-heads // r)
    parts = (x.q[:, :, :heads], x.k[:, :, :groups], x.v[:, :, :groups])
    return tuple(part.transpose(1, 2).contiguous() for part in parts)


def dense(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Causal attention, as many queries as keys, through each of torch's fused kernels."""

    def through(kernel: SDPBackend) -> Call:
        def run() -> Tensor:
            with sdpa_kernel(kernel):
                return sdpa(q, k, v, is_causal=True, enable_gqa=True)

        return run

    return {name: through(kernel) for name, kernel in FUSED.items()}


def dense_decoding(x: Inputs) -> dict[str, Call]:
    """One query token over all keys: torch's fused kernels, asked for in two ways each, GQA as such
    and the heads of a group as rows of one product."""
    q, k, v = (part.transpose(1, 2) for part in (x.q, x.k, x.v))
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)

    def through(kernel: SDPBackend, query: Tensor, gqa: bool) -> Call:
        def run() -> Tensor:
            with sdpa_kernel(kernel):
                return sdpa(query, k, v, enable_gqa=gqa)

        return run

    found = {}
    for name, kernel in FUSED.items():
        found[name] = through(kernel, q, True)
        found[f"{name}, a group's heads as rows"] = through(kernel, rows, False)
    return found


def flex(x: Inputs, selection: Selection, *leaves: Tensor) -> Call:
    """FlexAttention over the same selection: tiles of 128 queries walk over the union of their
    blocks, and a table in memory says for each query which of these are its own."""
    if not x.q.is_cuda:
        raise RuntimeError("FlexAttention is measured on a GPU only")
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    size, (_, g, t, _) = selection.block_size, selection.blocks.shape
    if t % FLEX_TILE or x.k.shape[1] % size:
        raise ValueError(f"FlexAttention is asked for whole tiles of {FLEX_TILE} queries only")
    r, number = x.q.shape[2] // g, x.k.shape[1] // size
    blocks = selection.blocks[0].long()
    chosen = torch.zeros(g, t, number + 1, dtype=torch.bool, device=x.q.device)
    chosen = chosen.scatter_(2, torch.where(blocks < 0, number, blocks), True)[..., :number]
    union = chosen.unflatten(1, (-1, FLEX_TILE)).any(2).repeat_interleave(r, 0)[None]
    order = union.to(torch.int8).argsort(-1, descending=True, stable=True).to(torch.int32)

    def own(b, h, query, key):
        return chosen[h // r, query, key // size] & (key <= query)

    count = union.sum(-1, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(count, order, BLOCK_SIZE=(FLEX_TILE, size), mask_mod=own)
    q, k, v = (part.transpose(1, 2) for part in leaves or (x.q, x.k, x.v))
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def fla(x: Inputs, selection: Selection, *leaves: Tensor) -> Call:
    """flash-linear-attention's NSA kernel over the same selection, without its other branches."""
    from fla.ops.nsa import parallel_nsa

    q, k, v = leaves or (x.q, x.k, x.v)
    blocks = selection.blocks.transpose(1, 2).long().contiguous()
    size, k_blocks = selection.block_size, blocks.shape[3]
    how = {"block_indices": blocks, "block_counts": k_blocks, "block_size": size}
    return lambda: parallel_nsa(q, k, v, **how)


def flash_msa(x: Inputs, selection: Selection, *leaves: Tensor) -> Call:
    """flash-msa: it chooses by itself, and its backward pass includes the KL's."""
    from flash_msa import flash_msa_func

    q, k, v = leaves or (x.q, x.k, x.v)
    index = [part.detach().requires_grad_(bool(leaves)) for part in (x.q_index, x.k_index)]
    parts = (index[0], index[1][:, :, None], q, k, v)
    q_index, k_index, q, k, v = (part.transpose(1, 2).contiguous() for part in parts)
    budget, scale = selection.blocks.shape[3] * selection.block_size, q.shape[-1] ** -0.5

    def run() -> Tensor:
        out, _ = flash_msa_func(q_index, k_index, q, k, v, budget, scale)
        return out.unflatten(2, (q.shape[1], -1))

    return run


PEERS = {"FlexAttention": flex, "fla": fla, "flash-msa": flash_msa}
