"""MiniMax-M3's attention layers as rooms: its own indexer read as an MSA index, the rest dense.

    q_index[t, g] = rope(norm(W_q x[t]))[g]        indexer.q_proj, q_norm     (MSA eqs. 5-6)
    k_index[t]    = rope(norm(W_k x[t]))           indexer.k_proj, k_norm

with the main branch's cosines and sines, cut to the width of the index.
"""

from __future__ import annotations

from dataclasses import dataclass

from openmsa.hf.room import Room
from openmsa.hf.rooms.msa import MSARoom
from openmsa.mechanisms.dense import DenseConfig, attend
from openmsa.mechanisms.msa import MSAConfig, MSAOutput


@dataclass(frozen=True)
class M3Room(MSARoom):
    """A sparse layer: nothing is added, the index is the layer's own `indexer`."""

    ADDED = ("indexer",)

    def read(self, attention, hidden, position_embeddings):
        indexer, hidden, width = attention.indexer, hidden.detach(), self._width(attention)
        q = indexer.q_norm(indexer.q_proj(hidden).unflatten(-1, (-1, width))).transpose(1, 2)
        k = indexer.k_norm(indexer.k_proj(hidden).unflatten(-1, (1, width))).transpose(1, 2)
        q, k = attention.rotate(q, k, *(x[..., :width] for x in position_embeddings))
        return {"q_index": q.transpose(1, 2)}, k.squeeze(1)

    def _width(self, attention) -> int:
        return attention.indexer.head_dim


@dataclass(frozen=True)
class M3DenseRoom(Room):
    """A layer of full attention: by our operation, whose memory does not grow with t x s."""

    config: DenseConfig

    NAME, CONFIG, PHASES = "dense", DenseConfig, ("dense",)

    def attend(self, attention, tensors, *, with_index_loss, phase, **how) -> MSAOutput:
        out, lse = attend(**tensors.named(), **how)
        return MSAOutput(out, None, None, lse)


def rooms_of(config) -> list[Room]:
    """The room of every layer of a text model, from its transformers configuration."""
    sparse = [i for i, kind in enumerate(config.layer_types) if kind == "minimax_m3_sparse"]
    numbers = MSAConfig(
        block_size=config.index_block_size,
        top_k=config.index_topk_blocks,
        d_index=config.index_head_dim,
        local_blocks=config.index_local_blocks,
        layers=tuple(sparse),
    )
    rooms = {True: M3Room(numbers), False: M3DenseRoom(DenseConfig())}
    return [rooms[layer in sparse] for layer in range(config.num_hidden_layers)]
