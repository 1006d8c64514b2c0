"""mlx-lm: the attention layer of its MiniMax-M3, with its mask, its cache and its files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import (
    BatchKVCache,
    CacheList,
    KVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.models.minimax_m3_vl import Attention, TextArgs
from torch import Tensor

from openmsa.conformance.adapter import Cache, NotOffered
from openmsa.conformance.adapters import package_version
from openmsa.conformance.adapters.hidden import Channels, require
from openmsa.conformance.adapters.mlx_arrays import to_mlx, to_torch
from openmsa.conformance.adapters.mlx_layer import (
    Layer,
    MlxAdapter,
    blocks_of,
    taking,
    unchanged,
    visible_blocks,
)
from openmsa.conformance.case import Inputs, Rule


class MlxLm(MlxAdapter):
    """Selection, attention with gradients, and a cache."""

    name = "mlx-lm"

    def version(self) -> str:
        return f"mlx-lm {package_version('mlx-lm')}, mlx {package_version('mlx')}"

    def check(self, x: Inputs) -> None:
        super().check(x)
        require(x.rule.sink_blocks == 0, "sink blocks")

    def select(self, x: Inputs) -> Tensor:
        self.check(x)
        require(x.mask is None, "returning the selection of padded rows")
        channels = Channels(x)
        attention = _attention(x, channels)
        layer = self.layer(x, channels)
        hidden, cache = self.after_prefix(layer, to_mlx(channels.hidden(x)), x)
        mask = create_attention_mask(hidden, None if cache is None else cache[0])
        index_cache = None if cache is None else cache[1]
        offset = 0 if cache is None else cache[0].offset
        kept = attention._block_mask(hidden, mask, offset, index_cache)
        if kept is None or isinstance(kept, str) or kept.ndim < 4:
            return visible_blocks(x)
        return blocks_of(kept, x)

    def layer(self, x: Inputs, channels: Channels) -> Layer:
        attention = _attention(x, channels)

        def run(hidden: mx.array, cache) -> mx.array:
            mask = create_attention_mask(hidden, None if cache is None else cache[0])
            return attention(hidden, mask, cache)

        return run

    def new_cache(self, left_padding: list[int] | None = None) -> CacheList:
        if left_padding is None:
            return CacheList(KVCache(), KVCache())
        return CacheList(BatchKVCache(left_padding), BatchKVCache(left_padding))

    def open_cache(self, rule: Rule) -> Cache:
        return _Session(self)


def _attention(x: Inputs, channels: Channels) -> Attention:
    sparse = x.rule.phase == "sparse"
    h, d = x.q.shape[2:]
    arguments = TextArgs(
        hidden_size=8,  # its projections are replaced
        num_attention_heads=h,
        num_key_value_heads=x.k.shape[2],
        head_dim=d,
        layer_types=["minimax_m3_sparse" if sparse else "full_attention"],
        index_n_heads=x.q_index.shape[2],
        index_head_dim=x.q_index.shape[3],
        index_block_size=x.rule.block_size,
        index_topk_blocks=x.rule.top_k,
        index_local_blocks=x.rule.local_blocks,
    )
    attention = Attention(arguments, 0)
    for name in ("q", "k", "v"):
        setattr(attention, f"{name}_proj", taking(channels, name))
    for name in ("q_norm", "k_norm", "rope", "o_proj"):
        setattr(attention, name, unchanged)
    if sparse:
        attention.index_q_proj = taking(channels, "q_index")
        attention.index_k_proj = taking(channels, "k_index")
        attention.index_q_norm = attention.index_k_norm = attention.index_rope = unchanged
    return attention


class _Session(Cache):
    def __init__(self, engine: MlxLm):
        self.engine, self.cache = engine, engine.new_cache()

    def append(self, x: Inputs) -> Tensor:
        self.engine.check(x)
        if x.mask is not None and not x.mask.all():
            self.cache = self.engine.new_cache((~x.mask).sum(1).tolist())
        channels = Channels(x)
        out = self.engine.layer(x, channels)(to_mlx(channels.hidden(x)), self.cache)
        return to_torch(out).unflatten(-1, x.q.shape[2:])

    def crop(self, length: int) -> None:
        self.cache.trim(self.cache[0].offset - length)

    def reorder(self, rows: tuple[int, ...]) -> None:
        raise NotOffered("reordering the rows of a cache (it has no beam search)")

    def reload(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "cache.safetensors")
            save_prompt_cache(path, [self.cache])
            self.cache = load_prompt_cache(path)[0]
            mx.eval(self.cache.state)
