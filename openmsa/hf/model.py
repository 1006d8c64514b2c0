"""What a converted causal language model adds to its base class: layout, losses and loading."""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.hf import attention, checks
from openmsa.hf.attention import LossRecord, MSAAttentionMixin
from openmsa.hf.cache import MSACacheLayer, msa_cache_layer
from openmsa.hf.classes import output_class
from openmsa.hf.config import from_fields
from openmsa.hf.context import check_alone
from openmsa.hf.layers import make_sparse
from openmsa.hf.layout import Layout, find_layout
from openmsa.hf.sharding import gather_for_backward
from openmsa.ops.context_parallel import Context


class MSAModelMixin:
    """Base of the class of every converted model, before the class of its dense model."""

    index_loss_weight = 1.0

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        make_sparse(self, from_fields(vars(config)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers.

        Raises ValueError for missing index weights and for weights that are not finite.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        room = model.msa_attentions()[0].msa_room
        added, kind = set(room.ADDED), "index" if room.INDEX else room.NAME
        missing = [n for n in sorted(info["missing_keys"]) if not added.isdisjoint(n.split("."))]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} {kind} weights, the first "
                f"is {missing[0]}; a dense checkpoint becomes sparse by openmsa.hf.convert"
            )
        checks.finite_weights(model)
        return (model, info) if with_info else model

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        if attn_implementation is not None:
            attention.check_name(attn_implementation)
        return attention.NAME

    def msa_attentions(self) -> list[MSAAttentionMixin]:
        """The attention modules of the sparse layers, in order."""
        return [module for module in self.modules() if isinstance(module, MSAAttentionMixin)]

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As in transformers, which may make masks for a cache that we refuse."""
        _hold_index(self.msa_attentions(), kwargs)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def forward(self, *args, **kwargs):
        """The forward pass of the base class, in training with the index loss added.

        Takes what the base takes, and index_rows_in_batch: the real tokens of all micro-batches of
        an optimizer step; and what openmsa.hf.split_context makes of a batch. Where there is an
        index, in the phases "warmup" and "sparse", in training, the output also holds lm_loss, and
        index_loss [sparse layers] (KL, eqs. 9-10), and loss = lm_loss + index_loss_weight *
        sum(index_loss) * this micro-batch's share of the step.
        Raises ValueError for inputs that sparse layers cannot follow.
        """
        kwargs.update(zip(type(self).msa_arguments, args))
        rows_in_batch = kwargs.pop("index_rows_in_batch", None)
        as_dict = kwargs.pop("return_dict", None)
        as_dict = self.config.return_dict if as_dict is None else as_dict
        layers = self.msa_attentions()
        kwargs["msa_layout"] = layout = self._layout(layers, kwargs)
        learns = layers[0].msa_room.INDEX and layers[0].msa_phase != "dense"
        record = LossRecord() if self.training and learns else None
        kwargs["msa_record"] = record
        out = super().forward(**kwargs, return_dict=True)
        if record is not None:
            share = _share(kwargs, layout, rows_in_batch)
            out = self._with_index_loss(out, record, share)
        return out if as_dict else out.to_tuple()

    def _with_index_loss(self, out, record: LossRecord, share):
        """`out` with index_loss, lm_loss and the sum of both; share: see `_share`."""
        attentions = [m for m in self.msa_attentions() if m.layer_idx in record.losses]
        losses = [(m, record.losses[m.layer_idx]) for m in attentions]
        gather_for_backward(self, losses, frozen=not out.logits.requires_grad)
        device = out.logits.device
        layers = torch.stack([record.losses[i].to(device) for i in sorted(record.losses)])
        fields = {**out, "lm_loss": out.loss, "index_loss": layers}
        if out.loss is not None:
            fields["loss"] = out.loss + self.index_loss_weight * share * layers.sum()
        return output_class(type(out))(**fields)

    def _layout(self, layers: list, kwargs: dict) -> Layout | Context | None:
        """Checks what came in, before any work, and finds the real tokens. May fill in `kwargs`."""
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError(
                "output_attentions=True is not supported: sparse layers never hold the weights; "
                "use openmsa.hf.capture_attention"
            )
        if (context := kwargs.pop("context", None)) is not None:
            check_alone(kwargs)
            kwargs["use_cache"] = False
            self._check_length(context.longest)
            return context
        inputs = kwargs.get("input_ids")
        batch, num_queries = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[:2]
        held = _hold_index(layers, kwargs)
        num_cached = held[0].get_seq_length() if held else 0
        borders = kwargs.get("cu_seq_lens_q")
        layout = find_layout(
            batch=batch,
            num_queries=num_queries,
            num_cached=num_cached,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            cu_seqlens=borders,
        )
        if layout is not None and layout.query_slots is None:
            _leave_cache_out(kwargs)
            if borders is not None:  # said in the one way that the dense layers understand
                kwargs |= {"attention_mask": None, "position_ids": _positions(borders, num_queries)}
        self._check_length(num_cached + num_queries if layout is None else layout.longest)
        return layout

    def _check_length(self, num_tokens: int) -> None:
        config = self.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if limit is not None and num_tokens > limit and rope.get("rope_type") != "dynamic":
            raise ValueError(
                f"a sequence of {num_tokens} tokens is longer than the {limit} positions of the "
                "model; shorten it, or raise model.config.max_position_embeddings if you trust "
                "its RoPE beyond them"
            )


def _hold_index(layers: list, kwargs: dict) -> list[MSACacheLayer]:
    """The cache layers of the sparse layers, if a cache came in. Raises ValueError as they do."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is None:
        return []
    return [msa_cache_layer(cache, m.layer_idx, m.msa_room.INDEX) for m in layers]


def _leave_cache_out(kwargs: dict) -> None:
    """Packed sequences have nothing that could be continued."""
    for name in ("cache", "past_key_values"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: packed sequences cannot be cached; pass a batch with an attention_mask "
                "instead"
            )
    kwargs["use_cache"] = False


def _positions(borders: Tensor, num_tokens: int) -> Tensor:
    """Position in its own sequence of every token of a packed row, int64 [1, tokens]."""
    starts = borders[:-1].long().repeat_interleave(borders.diff().long())
    return (torch.arange(num_tokens, device=borders.device) - starts)[None]


def _share(kwargs: dict, layout: Layout | Context | None, rows_in_batch):
    """This micro-batch's part of a step: of its tokens, if their number is known, or labels."""
    if rows_in_batch is not None:
        inputs = kwargs.get("input_ids")
        shape = (kwargs["inputs_embeds"] if inputs is None else inputs).shape
        return (shape[0] * shape[1] if layout is None else layout.num_queries) / rows_in_batch
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or labels is None:
        return 1.0
    shifted = kwargs.get("shift_labels")  # else counted as Trainer counts num_items_in_batch
    return ((labels[..., 1:] if shifted is None else shifted) != -100).sum() / total
