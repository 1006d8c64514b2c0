"""NSA in a layer: three gates per query head, and how a window of tokens becomes one key.

    gates[t, h] = sigmoid(W_gate x[t] + b_gate)[h]            compressed, selected, window
    K, V        = the keys and values of a window, weighted by position and channel

Both begin where a dense model is disturbed least: windows by their mean, the selected branch almost
open, the two others almost closed. sigmoid(3) + sigmoid(-3) = 1, so as long as everything is
selected and in the window, the output is the dense one and a twentieth of the compressed one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from openmsa.hf import checks
from openmsa.hf.index_branch import head_dim_of, num_groups_of
from openmsa.hf.room import Budget, Room
from openmsa.mechanisms.nsa import PHASES, NSAConfig, NSAOutput, compress, nsa_attention

GATES_AT_START = (-3.0, 3.0, -3.0)  # before the sigmoid: compressed, selected, window


@dataclass(frozen=True)
class NSARoom(Room):
    """Gates from the hidden states; all that is added learns from the model's own loss."""

    config: NSAConfig

    NAME, CONFIG, PHASES = "nsa", NSAConfig, PHASES
    ADDED = ("branch_gate_proj", "compress_k_weight", "compress_v_weight")

    def check(self, model, attention, init) -> None:
        """Raises ValueError for a layer that attends within a window, with a soft cap or sinks."""
        checks.can_attend(model, attention)

    def add(self, attention) -> None:
        q, groups, dim = attention.q_proj, num_groups_of(attention), head_dim_of(attention)
        like = {"device": q.weight.device, "dtype": q.weight.dtype}
        attention.branch_gate_proj = nn.utils.skip_init(
            nn.Linear, q.in_features, 3 * (q.out_features // dim), **like
        )
        for part, size in (("k", dim), ("v", attention.v_proj.out_features // groups)):
            weight = torch.empty(self.config.kernel, groups, size, **like)
            setattr(attention, f"compress_{part}_weight", nn.Parameter(weight))

    @torch.no_grad()
    def start(self, attention, initialise) -> None:
        attention.branch_gate_proj.weight.zero_()
        for branch, value in enumerate(GATES_AT_START):
            attention.branch_gate_proj.bias[branch::3].fill_(value)
        attention.compress_k_weight.zero_()
        attention.compress_v_weight.zero_()

    def read(self, attention, hidden, position_embeddings):
        return {"gates": attention.branch_gate_proj(hidden).unflatten(-1, (-1, 3)).sigmoid()}, None

    def attend(self, attention, tensors, *, with_index_loss, **how) -> NSAOutput:
        given = tensors.named()
        if how["phase"] == "dense":
            given |= {"k_compressed": None, "v_compressed": None}
        elif not tensors.pooled:
            given |= self.pool(attention, tensors.keys, cu_seqlens_k=how["cu_seqlens_k"])
        return nsa_attention(**given, config=self.config, **how)

    @property
    def windows(self) -> tuple[int, int]:
        return self.config.kernel, self.config.stride

    def pool(self, attention, keys, **where):
        """where: cu_seqlens_k of packed sequences."""
        weights = {"k": attention.compress_k_weight, "v": attention.compress_v_weight}
        return {
            f"{part}_compressed": compress(keys[part], weight, self.config, **where)
            for part, weight in weights.items()
        }

    @property
    def budget(self) -> Budget:
        """Of the selected branch."""
        config = self.config
        return Budget(config.block_size, config.top_k, config.local_blocks, config.sink_blocks)
