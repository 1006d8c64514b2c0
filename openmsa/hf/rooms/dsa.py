"""DSA in a layer: the lightning indexer beside the main branch, an index key kept of every token.

    q_index[t, j] = rope(norm(W_q_index x[t]))[j]        for every index head j
    k_index[t]    = rope(norm(W_k_index x[t]))
    w[t]          = W_w x[t] + b_w

with the main branch's norm and RoPE, as in MSA. Derived from the main branch, index head j is the
mean of its share of the query heads and every w is 1 / sqrt(index heads), so that a score is the
mean of their positive logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

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
from openmsa.mechanisms.dsa import PHASES, DSAConfig, DSAOutput, dsa_attention, select
from openmsa.selection import Selection


@dataclass(frozen=True)
class DSARoom(Room):
    """q_index, w and one k_index, from hidden states that get no gradient by them."""

    config: DSAConfig

    NAME, CONFIG, PHASES, INDEX = "dsa", DSAConfig, PHASES, True
    ADDED = (*MODULES, "index_w_proj", "index_channels")

    def check(self, model, attention, init) -> None:
        """Raises ValueError for numbers that do not fit the heads, and as for MSA."""
        config, dim = self.config, head_dim_of(attention)
        heads = attention.q_proj.out_features // dim
        if config.d_index % 2 or config.d_index > dim:
            raise ValueError(
                f"d_index={config.d_index} must be even and at most the head dim {dim} (RoPE turns "
                f"pairs of channels); use DSAConfig(d_index={dim})"
            )
        if init == "main" and heads % config.index_heads:
            raise ValueError(
                f"index_heads={config.index_heads} must divide the {heads} query heads for an "
                f"index derived from them; use DSAConfig(index_heads={heads}), or init='random'"
            )
        checks.can_follow(model, attention, config.d_index)

    def add(self, attention) -> None:
        config, weight = self.config, attention.q_proj.weight
        add_index_branch(attention, config.d_index, config.index_heads)
        like = {"device": weight.device, "dtype": weight.dtype}
        attention.index_w_proj = nn.utils.skip_init(
            nn.Linear, weight.shape[1], config.index_heads, **like
        )

    @torch.no_grad()
    def start(self, attention, initialise) -> None:
        start_at_random(attention, initialise)
        initialise(attention.index_w_proj)
        attention.index_w_proj.bias.fill_(self.config.index_heads**-0.5)

    @torch.no_grad()
    def derive(self, attention, sample) -> None:
        derive_from_main(attention, sample, self.config.d_index, self.config.index_heads)
        attention.index_w_proj.weight.zero_()
        attention.index_w_proj.bias.fill_(self.config.index_heads**-0.5)

    def read(self, attention, hidden, position_embeddings):
        hidden = hidden.detach()
        q_index, k_index = index_of(attention, hidden, position_embeddings, self.config.d_index)
        return {"q_index": q_index, "head_weights": attention.index_w_proj(hidden)}, k_index

    def attend(self, attention, tensors, *, with_index_loss, **how) -> DSAOutput:
        return dsa_attention(
            **tensors.named(), config=self.config, with_index_loss=with_index_loss, **how
        )

    def index_scale(self, attention) -> float:
        return (self.config.d_index * self.config.index_heads) ** -0.5

    @property
    def budget(self) -> Budget:
        """Blocks of one token."""
        return Budget(1, self.config.top_k)

    def select(self, call) -> Selection:
        return select(
            self.config,
            call.q_index,
            call.k_index,
            call.others["head_weights"],
            index_scale=call.index_scale,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
        )
