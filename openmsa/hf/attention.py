"""The attention function "openmsa" of transformers, and the attention module that feeds it.

A converted layer computes its index, puts the index keys into the cache and lets its base class do
the rest: the base projects, rotates, caches and calls the attention function with whatever keyword
arguments came in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from openmsa.hf.cache import MSACacheLayer, msa_cache_layer
from openmsa.hf.index_branch import index_of
from openmsa.hf.layout import Layout, find_layout, pack, unpack
from openmsa.mechanisms.msa import MSAConfig, MSAOutput, msa_attention
from openmsa.selection import Selection

NAME = "openmsa"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a sparse layer attended with, detached.

    q [b, t, h, d], k and v [b, s, g, d], q_index [b, t, g, d_index], k_index [b, s, d_index];
    packed (b = 1, with cu_seqlens) where the batch was padded or packed. selection is None in the
    phases "dense" and "warmup".
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    q_index: Tensor
    k_index: Tensor
    selection: Selection | None
    scale: float
    index_scale: float
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None


@dataclass(eq=False)
class LossRecord:
    """Index losses of one forward pass, by layer: recomputing a layer does not count twice."""

    losses: dict[int, Tensor] = field(default_factory=dict)
    with_gradient: bool = field(default_factory=torch.is_grad_enabled)

    def keep(self, layer: int, loss: Tensor) -> None:
        self.losses.setdefault(layer, loss)

    def check(self) -> None:
        """Raises ValueError inside a layer that runs without a graph although the model has one."""
        if self.with_gradient and not torch.is_grad_enabled():
            raise ValueError(
                "a sparse layer runs under reentrant gradient checkpointing, which would lose the "
                "index loss; "
                'enable checkpointing with {"use_reentrant": False}'
            )


@dataclass(eq=False)
class Masks:
    """The padding mask as it came in, and transformers' own mask if a dense layer asks for it."""

    padding: Tensor | None
    arguments: dict

    @cached_property
    def full(self) -> Tensor | None:
        return sdpa_mask(**self.arguments)


@dataclass(frozen=True, eq=False)
class _Index:
    """The index of one call, on its way through the base class."""

    queries: Tensor
    keys: Tensor
    cache: MSACacheLayer | None

    def all_keys(self) -> Tensor:
        return self.keys if self.cache is None else self.cache.take_index()


class MSAAttentionMixin:
    """What the attention class of every converted layer adds to that of its base."""

    msa: MSAConfig
    msa_d_index: int
    msa_phase = "sparse"
    msa_calls: list[AttentionCall] | None = None

    def forward(self, hidden_states, *args, **kwargs):
        check_name(self.config._attn_implementation)
        queries, keys = index_of(
            self, hidden_states.detach(), kwargs["position_embeddings"], self.msa_d_index
        )
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        layer = None if cache is None else msa_cache_layer(cache, self.layer_idx)
        if layer is not None:
            layer.stage(keys)
        index = _Index(queries, keys, layer)
        return super().forward(hidden_states, *args, msa_index=index, **kwargs)


def check_name(attn_implementation: str) -> None:
    """Raises ValueError for any attention function but ours."""
    if attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation={attn_implementation!r} would run the sparse layers dense; leave "
            "it out, or use "
            'openmsa.hf.set_phase(model, "dense") for dense attention and to_dense(model) for '
            "the dense model"
        )


def mask_function(*, attention_mask=None, **arguments) -> Masks:
    """No mask is built unless a layer that was left dense needs it."""
    return Masks(attention_mask, {"attention_mask": attention_mask, **arguments})


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Masks | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    msa_index: _Index | None = None,
    msa_record: LossRecord | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it, by the name "openmsa".

    query [b, h, t, d], key and value [b, g, s, d] -> [b, t, h, d], None. A layer that was left
    dense runs transformers' scaled dot product attention, its sliding window and all.
    Raises ValueError for dropout, for attention that is not causal and for custom masks.
    """
    if msa_index is None:
        mask = attention_mask.full if isinstance(attention_mask, Masks) else attention_mask
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} is not supported in a sparse layer; set "
            "model.config.attention_dropout and the attention_dropout of its layers to 0"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal=False is not supported: block selection is causal")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    layout = (
        kwargs["msa_layout"] if "msa_layout" in kwargs else _layout(q, k, attention_mask, kwargs)
    )
    call = _Call(module, scaling, msa_record if module.msa_phase != "dense" else None)
    tensors = (q, k, v, msa_index.queries, msa_index.all_keys())
    if module.msa_calls is not None and msa_index.cache is not None:
        msa_index.cache.expose()
    with torch.autocast(q.device.type, enabled=False):
        return call.over(_one_dtype(tensors), layout), None


def _layout(q: Tensor, k: Tensor, masks: Masks | None, kwargs: dict) -> Layout | None:
    """For calls that did not come through the causal language model, such as model.model(...)."""
    padding = masks.padding if isinstance(masks, Masks) else masks
    return find_layout(
        batch=q.shape[0],
        num_queries=q.shape[1],
        num_cached=k.shape[1] - q.shape[1],
        attention_mask=padding,
        position_ids=kwargs.get("position_ids"),
        cu_seqlens=kwargs.get("cu_seq_lens_q"),
    )


def _one_dtype(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As autocast wants it, like transformers' own attention; without autocast, as the values."""
    kind = tensors[0].device.type
    auto = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if auto else tensors[2].dtype
    return tuple(x.to(dtype) for x in tensors)


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    scale: float
    record: LossRecord | None

    def over(self, tensors: tuple[Tensor, ...], layout: Layout | None) -> Tensor:
        q, k = tensors[:2]
        if layout is None:
            return self._attend(tensors).out
        decoding = k.shape[1] > q.shape[1] and self.record is None and self.module.msa_calls is None
        if layout.spans is not None and decoding:
            return self._by_spans(tensors, layout)
        slots = (layout.query_slots, layout.key_slots)
        packed = [pack(x, slots[i]) for x, i in zip(tensors, (0, 1, 1, 0, 1))]
        borders = (layout.cu_seqlens_q.to(q.device), layout.cu_seqlens_k.to(q.device))
        out = self._attend(packed, *borders).out
        return unpack(out, layout.query_slots, q.shape[0], q.shape[1])

    def _by_spans(self, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
        """Attend without copying the cache: each span of rows is a view of it."""
        q, v = tensors[0], tensors[2]
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        for span in layout.spans:
            taken = (span.queries, span.keys, span.keys, span.queries, span.keys)
            part = [x[span.rows, where] for x, where in zip(tensors, taken)]
            out[span.rows, span.queries] = self._attend(part).out
        return out

    def _attend(self, tensors, cu_seqlens_q=None, cu_seqlens_k=None) -> MSAOutput:
        module, config, record = self.module, self.module.msa, self.record
        if record is not None:
            record.check()
        result = msa_attention(
            *tensors,
            block_size=config.block_size,
            top_k=config.top_k,
            phase=module.msa_phase,
            local_blocks=config.local_blocks,
            sink_blocks=config.sink_blocks,
            scale=self.scale,
            with_index_loss=record is not None,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
        if record is not None:
            record.keep(module.layer_idx, result.index_loss)
        if module.msa_calls is not None:
            detached = [x.detach() for x in tensors]
            scales = (self.scale, module.msa_d_index**-0.5)
            borders = (cu_seqlens_q, cu_seqlens_k)
            call = AttentionCall(module.layer_idx, *detached, result.selection, *scales, *borders)
            module.msa_calls.append(call)
        return result


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
