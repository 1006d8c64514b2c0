"""fla-core: the naive selection branch of its NSA, which is attention over given blocks."""

from __future__ import annotations

from fla.ops.nsa.naive import naive_nsa_selection
from torch import Tensor

from openmsa.conformance.adapter import TorchAdapter
from openmsa.conformance.adapters import package_version
from openmsa.conformance.adapters.hidden import require
from openmsa.conformance.case import Inputs


class FlaCore(TorchAdapter):
    """Attention with gradients; blocks are given."""

    name = "fla-core"

    def version(self) -> str:
        return f"fla-core {package_version('fla-core')}"

    def attend(self, x: Inputs) -> tuple[Tensor, None]:
        require(x.rule.phase == "sparse", "dense attention")
        require(x.mask is None, "padded rows")
        together = x.q.shape[1] == x.k.shape[1]
        require(together, "fewer queries than keys (its naive function asserts equality)")
        out = naive_nsa_selection(
            x.q,
            x.k,
            x.v,
            x.blocks.transpose(1, 2).long(),
            block_size=x.rule.block_size,
            scale=x.scale,
            cu_seqlens=x.cu_seqlens_q.long() if x.packed else None,
        )
        return out, None
