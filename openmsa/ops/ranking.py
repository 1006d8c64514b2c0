"""The best blocks of every query, in an order that no device can change.

The order that the definition asks for (forced, then score descending, then block number ascending)
becomes one whole number per block, and the best k numbers are the answer: no two are equal, so ties
cannot depend on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_blocks(best: Tensor, rule: tuple[int, int, int, int], position: int) -> Tensor:
    """best [b, g, t, n] -> int32 [b, g, t, top_k], ascending, -1 at the end.

    rule: block_size, top_k, local_blocks, sink_blocks. Query i stands at position + i and sees the
    blocks up to its own. NaN must be gone.
    """
    block_size, top_k, local_blocks, sink_blocks = rule
    t, n = best.shape[-2:]
    block = torch.arange(n, device=best.device)
    own = torch.arange(position, position + t, device=best.device)[:, None] // block_size
    order = _whole_numbers(best)
    lowest, highest = torch.iinfo(order.dtype).min, torch.iinfo(order.dtype).max
    forced = (block > own - local_blocks) | (block < sink_blocks)
    order.masked_fill_(forced, highest).masked_fill_(block > own, lowest)
    if order.dtype == torch.int32:
        # Below the score the block number, so that equal scores prefer the lower one.
        order = (order.long() << 32) + (2**31 - block)
        kept = order.topk(min(top_k, n), -1, sorted=False).indices
    else:
        kept = order.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    kept = torch.where(kept > own, n, kept).to(torch.int32).sort(-1).values
    kept = kept.masked_fill_(kept == n, -1)
    return torch.nn.functional.pad(kept, (0, top_k - kept.shape[-1]), value=-1)


def _whole_numbers(x: Tensor) -> Tensor:
    """int32 (int64 for fp64) in the order of x; -0 and +0 become equal; NaN must be gone."""
    kind = torch.int64 if x.dtype == torch.float64 else torch.int32
    bits = (x + 0.0).contiguous().view(kind)
    # Bits of negative floats ascend with their size; flipping all but the sign turns that around.
    return bits ^ ((bits >> torch.iinfo(kind).bits - 1) & torch.iinfo(kind).max)
