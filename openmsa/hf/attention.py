"""The attention function "openmsa" of transformers, and the attention module that feeds it.

A converted layer computes what its mechanism reads off the hidden states, puts the index keys (if
there are any) into the cache and lets its base class do the rest: the base projects, rotates,
caches and calls the attention function with whatever keyword arguments came in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from openmsa.hf.cache import MSACacheLayer, msa_cache_layer
from openmsa.hf.context import dense_in_context
from openmsa.hf.layout import Layout, find_layout, pack, unpack
from openmsa.hf.room import Attended, Room, Tensors
from openmsa.ops.context_parallel import Chunk, Context, attend_in_chunks
from openmsa.selection import Selection

NAME = "openmsa"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a converted layer attended with, detached.

    q [b, t, h, d], k and v [b, s, g, d], q_index [b, t, g, d_index], k_index [b, s, d_index];
    packed (b = 1, with cu_seqlens) where the batch was padded or packed. selection is None in the
    phases "dense" and "warmup". The index's tensors and scale are None where there is no index;
    others: what else the mechanism reads per query token, by name; room: the mechanism.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    q_index: Tensor | None
    k_index: Tensor | None
    selection: Selection | None
    scale: float
    index_scale: float | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    others: dict[str, Tensor] = field(default_factory=dict)
    room: Room | None = None


class LossRecord:
    """Index losses of one forward pass, by layer: recomputing a layer does not count twice.

    No dataclass: FSDP copies those on their way into a layer.
    """

    def __init__(self) -> None:
        self.losses: dict[int, Tensor] = {}
        self.with_gradient = torch.is_grad_enabled()

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
class _Read:
    """What a layer read off the hidden states, on its way through the base class."""

    queries: dict[str, Tensor]
    index_keys: Tensor | None
    cache: MSACacheLayer | None

    def with_main(self, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        """All that the attention of this step reads; index keys of the whole cache."""
        index_keys = self.index_keys if self.cache is None else self.cache.take_index()
        index = {} if index_keys is None else {"k_index": index_keys}
        return Tensors({"q": q, **self.queries}, {"k": k, "v": v, **index})


class MSAAttentionMixin:
    """What the attention class of every converted layer adds to that of its base."""

    msa_room: Room
    msa_phase = "sparse"
    msa_calls: list[AttentionCall] | None = None

    def forward(self, hidden_states, *args, **kwargs):
        check_name(self.config._attn_implementation)
        room = self.msa_room
        queries, index_keys = room.read(self, hidden_states, kwargs["position_embeddings"])
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        layer = None if cache is None else msa_cache_layer(cache, self.layer_idx, room.INDEX)
        if layer is not None:
            layer.stage(index_keys)
        read = _Read(queries, index_keys, layer)
        return super().forward(hidden_states, *args, msa_read=read, **kwargs)


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
    msa_read: _Read | None = None,
    msa_record: LossRecord | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it, by the name "openmsa".

    query [b, h, t, d], key and value [b, g, s, d] -> [b, t, h, d], None. A layer that was left
    dense runs transformers' scaled dot product attention, its sliding window and all.
    Raises ValueError for dropout, for attention that is not causal and for custom masks.
    """
    if msa_read is None:
        _check_not_selected(kwargs)
        if isinstance(context := kwargs.get("msa_layout"), Context):
            window = kwargs.get("sliding_window")
            out = dense_in_context(
                module, query, key, value, context, scale=scaling, sliding_window=window
            )
            return out, None
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
    record = msa_record if module.msa_phase != "dense" else None
    call = _Call(module, scaling, record, msa_read.cache)
    tensors = msa_read.with_main(q, k, v).in_one_dtype()
    if module.msa_calls is not None and msa_read.cache is not None:
        msa_read.cache.expose()
    with torch.autocast(q.device.type, enabled=False):
        return call.over(tensors, layout), None


def _check_not_selected(kwargs: dict) -> None:
    """Raises ValueError for a layer whose own indexer has chosen blocks: it would run dense."""
    if kwargs.get("block_indices") is not None:
        raise ValueError("the sparse layers would run dense; call openmsa.hf.enable(model)")


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


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    scale: float
    record: LossRecord | None
    cache: MSACacheLayer | None = None

    def over(self, tensors: Tensors, layout: Layout | Context | None) -> Tensor:
        q, k = tensors.queries["q"], tensors.keys["k"]
        if layout is None:
            return self._attend(self._with_pooled(tensors, slice(None), 0)).out
        if isinstance(layout, Context):
            return self._in_context(tensors, layout)
        decoding = k.shape[1] > q.shape[1] and self.record is None and self.module.msa_calls is None
        if layout.spans is not None and decoding:
            return self._by_spans(tensors, layout)
        packed = tensors.each(
            lambda x: pack(x, layout.query_slots), lambda x: pack(x, layout.key_slots)
        )
        borders = (layout.cu_seqlens_q.to(q.device), layout.cu_seqlens_k.to(q.device))
        out = self._attend(packed, *borders).out
        return unpack(out, layout.query_slots, q.shape[0], q.shape[1])

    def _by_spans(self, tensors: Tensors, layout: Layout) -> Tensor:
        """Attend without copying the cache: each span of rows is a view of it."""
        q, v = tensors.queries["q"], tensors.keys["v"]
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        for span in layout.spans:
            queries, keys = (span.rows, span.queries), (span.rows, span.keys)
            part = tensors.each(lambda x, at=queries: x[at], lambda x, at=keys: x[at])
            out[queries] = self._attend(self._with_pooled(part, span.rows, span.keys.start)).out
        return out

    def _with_pooled(self, tensors: Tensors, rows: slice, first: int) -> Tensors:
        """And what the cache keeps of windows of these rows, if no gradient has to go through."""
        module, cache, room = self.module, self.cache, self.module.msa_room
        if None in (cache, room.windows) or module.msa_phase == "dense" or torch.is_grad_enabled():
            return tensors
        return replace(tensors, pooled=cache.pooled(room, module, tensors.keys, rows, first))

    def _in_context(self, tensors: Tensors, context: Context) -> Tensor:
        """Queries of this process against the keys of all; its loss is the mean over its own."""
        module, record, names = self.module, self.record, set(tensors.queries)
        module.msa_room.check_context()
        if record is not None:
            record.check()

        def attend(part: dict[str, Tensor], chunk: Chunk) -> tuple[Tensor, Tensor | None]:
            kept = None if record is None else LossRecord()
            queries = {name: part.pop(name) for name in names}
            borders = (chunk.cu_seqlens_q, chunk.cu_seqlens_k)
            out = _Call(module, self.scale, kept)._attend(Tensors(queries, part), *borders).out
            return out, None if kept is None else kept.losses[module.layer_idx]

        out, loss = attend_in_chunks(context, tensors.queries, tensors.keys, attend)
        if record is not None:
            record.keep(module.layer_idx, loss)
        return out

    def _attend(self, tensors: Tensors, cu_seqlens_q=None, cu_seqlens_k=None) -> Attended:
        module, record = self.module, self.record
        if record is not None:
            record.check()
        result = module.msa_room.attend(
            module,
            tensors,
            with_index_loss=record is not None,
            phase=module.msa_phase,
            scale=self.scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
        if record is not None:
            record.keep(module.layer_idx, result.index_loss)
        if module.msa_calls is not None:
            borders = (cu_seqlens_q, cu_seqlens_k)
            module.msa_calls.append(self._seen(tensors, result.selection, borders))
        return result

    def _seen(self, tensors: Tensors, selection: Selection | None, borders) -> AttentionCall:
        module, room = self.module, self.module.msa_room
        found = tensors.each(Tensor.detach, Tensor.detach).named()
        main = [found.pop(name) for name in ("q", "k", "v")]
        index = [found.pop(name, None) for name in ("q_index", "k_index")]
        scales = (self.scale, room.index_scale(module))
        return AttentionCall(
            module.layer_idx, *main, *index, selection, *scales, *borders, others=found, room=room
        )


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
