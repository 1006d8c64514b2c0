"""mlx-vlm: the attention layer of its MiniMax-M3, on a CPU without its Metal kernels."""

from __future__ import annotations

import mlx.core as mx
from mlx_vlm.models.base import create_attention_mask
from mlx_vlm.models.minimax_m3_vl.config import TextConfig
from mlx_vlm.models.minimax_m3_vl.language import (
    MiniMaxAttention,
    MiniMaxM3BatchKVCache,
    MiniMaxM3KVCache,
)
from torch import Tensor

from openmsa.conformance.adapter import Cache, NotOffered
from openmsa.conformance.adapters import package_version
from openmsa.conformance.adapters.hidden import Channels, require
from openmsa.conformance.adapters.mlx_arrays import to_mlx, to_torch
from openmsa.conformance.adapters.mlx_layer import (
    Layer,
    MlxAdapter,
    taking,
    unchanged,
    visible_blocks,
)
from openmsa.conformance.case import Inputs, Rule


class MlxVlm(MlxAdapter):
    """Selection, attention with gradients, and a cache."""

    name = "mlx-vlm"

    def version(self) -> str:
        return f"mlx-vlm {package_version('mlx-vlm')}, mlx {package_version('mlx')}"

    def select(self, x: Inputs) -> Tensor:
        self.check(x)
        channels = Channels(x)
        attention, layer = _attention(x, channels), self.layer(x, channels)
        hidden, cache = self.after_prefix(layer, to_mlx(channels.hidden(x)), x)
        require(x.mask is None, "returning the selection of padded rows")
        start = x.k.shape[1] - x.q.shape[1]
        blocks, _, _ = attention.indexer(hidden, unchanged, start, cache, start, None, None)
        if blocks is None:
            return visible_blocks(x)
        return to_torch(blocks)[:, None]

    def gradients(self, x: Inputs) -> dict[str, Tensor]:
        chosen = x.rule.phase == "sparse" and x.k.shape[1] > x.rule.block_size * x.rule.top_k
        require(not chosen, "gradients where blocks are chosen (MLX refuses its gather)")
        return super().gradients(x)

    def layer(self, x: Inputs, channels: Channels) -> Layer:
        attention = _attention(x, channels)

        def run(hidden: mx.array, cache) -> mx.array:
            return attention(hidden, create_attention_mask(hidden, cache), cache)

        return run

    def new_cache(self, left_padding: list[int] | None = None):
        if left_padding is None:
            return MiniMaxM3KVCache()
        return MiniMaxM3BatchKVCache(left_padding)

    def open_cache(self, rule: Rule) -> Cache:
        return _Session(self)


def _attention(x: Inputs, channels: Channels) -> MiniMaxAttention:
    sparse = x.rule.phase == "sparse"
    arguments = TextConfig(
        hidden_size=8,  # its projections are replaced
        num_hidden_layers=1,
        num_attention_heads=x.q.shape[2],
        num_key_value_heads=x.k.shape[2],
        head_dim=x.q.shape[3],
        sparse_attention_config={
            "use_sparse_attention": sparse,
            "sparse_attention_freq": [int(sparse)],
            "sparse_num_index_heads": x.q_index.shape[2],
            "sparse_index_dim": x.q_index.shape[3],
            "sparse_block_size": x.rule.block_size,
            "sparse_topk_blocks": x.rule.top_k,
            "sparse_init_block": x.rule.sink_blocks,
            "sparse_local_block": x.rule.local_blocks,
            "sparse_score_type": "max",
        },
    )
    attention = MiniMaxAttention(arguments, 0)
    for name in ("q", "k", "v"):
        setattr(attention, f"{name}_proj", taking(channels, name))
    for name in ("q_norm", "k_norm", "rope", "o_proj"):
        setattr(attention, name, unchanged)
    if sparse:
        attention.index_q_proj = taking(channels, "q_index")
        attention.index_k_proj = taking(channels, "k_index")
        attention.index_q_norm = attention.index_k_norm = unchanged
    return attention


class _Session(Cache):
    def __init__(self, engine: MlxVlm):
        self.engine, self.cache = engine, engine.new_cache()

    def append(self, x: Inputs) -> Tensor:
        self.engine.check(x)
        if x.mask is not None and not x.mask.all():
            self.cache = self.engine.new_cache((~x.mask).sum(1).tolist())
        channels = Channels(x)
        out = self.engine.layer(x, channels)(to_mlx(channels.hidden(x)), self.cache)
        return to_torch(out).unflatten(-1, x.q.shape[2:])

    def crop(self, length: int) -> None:
        self.cache.trim(self.cache.offset - length)

    def reorder(self, rows: tuple[int, ...]) -> None:
        raise NotOffered("reordering the rows of a cache (it has no beam search)")

    def reload(self) -> None:
        state, meta = self.cache.state, self.cache.meta_state
        self.cache = self.engine.new_cache()
        self.cache.state, self.cache.meta_state = state, meta
