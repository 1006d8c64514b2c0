"""Selection: the only thing that crosses from choosing blocks to attending to them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, int32


@dataclass(frozen=True, eq=False)
class Selection:
    """Which blocks of keys every query token reads.

    blocks: int32 [b, g, t, k]; g is 1 (one choice for all heads), the number of KV heads, or the
    number of query
        heads. Each row holds block numbers, ascending, then -1 in the empty slots. Block number m
        is the keys m * block_size ... (m + 1) * block_size - 1 of the query's own sequence.
    block_size: tokens in a block.

    Raises ValueError for blocks of another rank or dtype and for a block size below 1.
    """

    blocks: Tensor
    block_size: int

    def __post_init__(self):
        if self.blocks.dim() != 4:
            raise ValueError(f"blocks must be [b, g, t, k], got shape {tuple(self.blocks.shape)}")
        if self.blocks.dtype != int32:
            raise ValueError(
                f"blocks must be int32, got {self.blocks.dtype}; use blocks.to(torch.int32)"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {self.block_size}")
