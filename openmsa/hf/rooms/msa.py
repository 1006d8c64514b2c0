"""MSA in a layer: an index branch beside the main one, an index key kept of every token."""

from __future__ import annotations

from dataclasses import dataclass

from openmsa.hf import checks
from openmsa.hf.derive import derive_from_main
from openmsa.hf.index_branch import (
    MODULES,
    add_index_branch,
    head_dim_of,
    index_of,
    start_at_random,
)
from openmsa.hf.room import Budget, Room
from openmsa.mechanisms.msa import PHASES, MSAConfig, MSAOutput, msa_attention, select
from openmsa.selection import Selection


@dataclass(frozen=True)
class MSARoom(Room):
    """q_index of every group and one k_index, from hidden states that get no gradient by them."""

    config: MSAConfig

    NAME, CONFIG, PHASES, INDEX = "msa", MSAConfig, PHASES, True
    ADDED = (*MODULES, "index_channels")

    def check(self, model, attention, init) -> None:
        """Raises ValueError where the index could not do as the main branch does."""
        checks.can_follow(model, attention, checks.width(self.config, attention))

    def add(self, attention) -> None:
        add_index_branch(attention, self._width(attention))

    def start(self, attention, initialise) -> None:
        start_at_random(attention, initialise)

    def derive(self, attention, sample) -> None:
        derive_from_main(attention, sample, self._width(attention))

    def read(self, attention, hidden, position_embeddings):
        width = self._width(attention)
        q_index, k_index = index_of(attention, hidden.detach(), position_embeddings, width)
        return {"q_index": q_index}, k_index

    def attend(self, attention, tensors, *, with_index_loss, **how) -> MSAOutput:
        config = self.config
        return msa_attention(
            **tensors.named(),
            block_size=config.block_size,
            top_k=config.top_k,
            local_blocks=config.local_blocks,
            sink_blocks=config.sink_blocks,
            with_index_loss=with_index_loss,
            **how,
        )

    def index_scale(self, attention) -> float:
        return self._width(attention) ** -0.5

    @property
    def budget(self) -> Budget:
        config = self.config
        return Budget(config.block_size, config.top_k, config.local_blocks, config.sink_blocks)

    def select(self, call) -> Selection:
        return select(
            self.config,
            call.q_index,
            call.k_index,
            index_scale=call.index_scale,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
        )

    def _width(self, attention) -> int:
        given = self.config.d_index
        return head_dim_of(attention) if given is None else given
