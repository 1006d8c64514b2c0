"""Every native operation once, with gradients, on tensors of any layout."""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa import Selection, dense_attention, index_loss, select_blocks, sparse_attention
from tests.support import seeded

NAMES = (
    *("blocks", "out", "lse", "dq", "dk", "dv", "dense", "dense lse", "dense dq", "dense dk"),
    *("dense dv", "loss", "dq_index", "dk_index", "warm loss", "warm dq_index", "warm dk_index"),
)


def everything(
    tensors: tuple[Tensor, ...],
    *,
    block_size: int,
    top_k: int,
    backend: str = "cpu",
    blocks: Tensor | None = None,
    dout: Tensor | None = None,
    row_weights: Tensor | None = None,
    **where,
) -> list[Tensor]:
    """tensors: q, k, v, q_index, k_index. Results in the order of NAMES."""
    rule = {"backend": backend, **where}
    q, k, v, q_index, k_index = leaves = [x.detach().requires_grad_() for x in tensors]
    chosen = select_blocks(q_index, k_index, block_size=block_size, top_k=top_k, **rule)
    results = [chosen.blocks]
    chosen = chosen if blocks is None else Selection(blocks, block_size)
    for attend in (
        lambda: sparse_attention(q, k, v, chosen, return_lse=True, **rule),
        lambda: dense_attention(q, k, v, return_lse=True, **rule),
    ):
        out, lse = attend()
        upstream = seeded(*out.shape, seed=99, dtype=out.dtype) if dout is None else dout
        results += [out.detach(), lse, *torch.autograd.grad(out, leaves[:3], upstream)]
    for support in (chosen, None):
        loss = index_loss(q, k, q_index, k_index, support, row_weights=row_weights, **rule)
        results += [loss.detach(), *torch.autograd.grad(loss, leaves[3:])]
    return results


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def differing(first: list[Tensor], second: list[Tensor]) -> list[str]:
    """Names of the results that are not the same."""
    return [name for name, *pair in zip(NAMES, first, second, strict=True) if not same(*pair)]
