"""transformers' MiniMax-M3: its attention layer and indexer, run as its model runs them.

Padding and packing come in as they do from the model: a mask that transformers builds, positions
that restart. The queries of a longer sequence follow a cache filled with what came before.
"""

from __future__ import annotations

import inspect
import pickle

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

from openmsa.conformance.adapter import Cache, TorchAdapter
from openmsa.conformance.adapters import package_version
from openmsa.conformance.adapters.hidden import Channels, plain_shape, require
from openmsa.conformance.case import Inputs, Rule

# The name of the cache among the arguments, which changed during 5.x.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else None
CACHE = CACHE or "past_key_values"


class TransformersM3(TorchAdapter):
    """Eager attention on whatever device; no loss, no log-sum-exp."""

    name = "transformers"

    def version(self) -> str:
        return f"transformers {package_version('transformers')}"

    def select(self, x: Inputs) -> Tensor:
        layer = Layer(x)
        hidden, cache = layer.after_prefix(x)
        positions = layer.positions(x)
        return layer.attention.indexer(hidden, layer.unrotated(hidden), cache, positions)

    def attend(self, x: Inputs) -> tuple[Tensor, None]:
        layer = Layer(x)
        if x.imposed:
            return layer.attend_to(x), None
        hidden, cache = layer.after_prefix(x)
        return layer.run(hidden, cache, layer.positions(x), x.mask), None

    def open_cache(self, rule: Rule) -> Cache:
        return Session()


class Layer:
    """One attention layer for inputs of this shape, with nothing to learn in it."""

    def __init__(self, x: Inputs):
        plain_shape(x)
        require(x.rule.sink_blocks == 0, "sink blocks")
        self.channels, self.sparse = Channels(x), x.rule.phase == "sparse"
        h, d = x.q.shape[2:]
        self.config = MiniMaxM3VLTextConfig(
            hidden_size=self.channels.width,
            num_hidden_layers=1,
            num_attention_heads=h,
            num_key_value_heads=x.k.shape[2],
            head_dim=d,
            index_n_heads=x.q_index.shape[2],
            index_head_dim=x.q_index.shape[3],
            index_block_size=x.rule.block_size,
            index_topk_blocks=x.rule.top_k,
            index_local_blocks=x.rule.local_blocks,
            layer_types=["minimax_m3_sparse" if self.sparse else "full_attention"],
        )
        self.config._attn_implementation = "eager"
        with torch.device("meta"):
            self.attention = m3.MiniMaxM3VLAttention(self.config, layer_idx=0).eval()
        for name in ("q", "k", "v"):
            setattr(self.attention, f"{name}_proj", self.channels.take(name))
        owners = [self.attention]
        if self.sparse:
            owners.append(self.attention.indexer)
            self.attention.indexer.q_proj = self.channels.take("q_index")
            self.attention.indexer.k_proj = self.channels.take("k_index")
        for owner in owners:
            owner.q_norm = owner.k_norm = nn.Identity()
        self.attention.o_proj = nn.Identity()
        self.heads = (h, d)

    def unrotated(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of no rotation, for two channels: the others are left alone."""
        cos = hidden.new_ones(*hidden.shape[:2], 2)
        return cos, torch.zeros_like(cos)

    def positions(self, x: Inputs) -> Tensor:
        """As its generation and its collators count them."""
        t, s = x.q.shape[1], x.k.shape[1]
        if x.mask is not None:
            return (x.mask.long().cumsum(-1) - 1).clamp(min=0)
        if x.packed:
            same = torch.equal(x.cu_seqlens_q, x.cu_seqlens_k)
            require(same, "packed sequences with fewer queries than keys")
            lengths = x.cu_seqlens_q.diff().tolist()
            return torch.cat([torch.arange(n, device=x.q.device) for n in lengths])[None]
        return torch.arange(s - t, s, device=x.q.device).expand(x.q.shape[0], -1)

    def after_prefix(self, x: Inputs) -> tuple[Tensor, DynamicCache | None]:
        """Hidden vectors of the queries, and the cache of the tokens before them."""
        before = x.k.shape[1] - x.q.shape[1]
        if before == 0 or x.packed:
            self.positions(x)
            return self.channels.hidden(x), None
        prefix, hidden = self.channels.hidden(x).split([before, x.q.shape[1]], 1)
        cache = DynamicCache(config=self.config)
        positions = torch.arange(before, device=x.q.device).expand(x.q.shape[0], -1)
        self.before_prefix(x, before)
        self.run(prefix, cache, positions)
        return hidden, cache

    def before_prefix(self, x: Inputs, before: int) -> None:
        """What a layer of another kind needs before it reads `before` tokens."""

    def run(
        self, hidden: Tensor, cache, positions: Tensor, mask: Tensor | None = None, **more
    ) -> Tensor:
        """Hidden vectors [b, t, width] -> out [b, t, h, d]; the cache grows."""
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None if mask is None else mask.long(),
            position_ids=positions,
            **{CACHE: cache},
        )
        out, _ = self.attention(
            hidden_states=hidden,
            position_embeddings=self.unrotated(hidden),
            attention_mask=mask,
            position_ids=positions,
            **{CACHE: cache},
            **more,
        )
        return out.unflatten(-1, self.heads)

    def attend_to(self, x: Inputs) -> Tensor:
        """Attention to blocks that are given, by the functions that the layer calls."""
        q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
        positions = self.positions(x)
        mask = self.attention.indexer.build_block_mask(
            x.blocks.long(), None, x.k.shape[1], x.q.dtype, x.q.device, positions
        )
        how = {"scaling": self.attention.scaling}
        return m3.eager_attention_forward(self.attention, q, k, v, mask, **how)[0]


class Session(Cache):
    def __init__(self):
        self.cache = self.mask = None

    @torch.no_grad()
    def append(self, x: Inputs) -> Tensor:
        return self.grow(Layer(x), x)

    def grow(self, layer: Layer, x: Inputs) -> Tensor:
        """Let a layer read the tokens of x behind what is held."""
        if self.cache is None:
            self.cache = DynamicCache(config=layer.config)
        held, new = self.cache.get_seq_length(), x.q.shape[1]
        positions = torch.arange(held, held + new, device=x.q.device).expand(x.q.shape[0], -1)
        if x.mask is not None:
            self.mask = x.mask if self.mask is None else torch.cat([self.mask, x.mask], 1)
            positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        return layer.run(layer.channels.hidden(x), self.cache, positions, self.mask)

    def crop(self, length: int) -> None:
        self.cache.crop(length - self.cache.get_seq_length())

    def reorder(self, rows: tuple[int, ...]) -> None:
        self.cache.reorder_cache(torch.tensor(rows))

    def reload(self) -> None:
        self.cache = pickle.loads(pickle.dumps(self.cache))
