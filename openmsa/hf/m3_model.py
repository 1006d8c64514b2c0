"""What an enabled MiniMax-M3 adds to the classes of transformers: attention, indexer and model."""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.hf.attention import NAME, LossRecord, MSAAttentionMixin
from openmsa.hf.m3_cache import hold_index
from openmsa.hf.model import MSAModelMixin


class _Attached(torch.autograd.Function):
    """x as it is; in the backward pass `loss` gets the gradient 1, whatever x gets."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.one


class M3AttentionMixin(MSAAttentionMixin):
    """Before the attention class of transformers: a cache of its kinds is continued in ours.

    Trainers that call the backbone and its head themselves (TRL) never see our loss. There the
    layer attaches its KL to its output, times msa_loss_weight. msa_index_loss: the KL of the last
    training pass, detached.
    """

    msa_loss_weight = 1.0
    msa_index_loss: Tensor | None = None

    def forward(self, hidden_states, *args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        hold_index(cache, self.layer_idx, self.msa_room.INDEX)
        learns = self.training and self.msa_room.INDEX and self.msa_phase != "dense"
        attach = learns and "msa_record" not in kwargs and torch.is_grad_enabled()
        if attach:
            kwargs["msa_record"] = LossRecord()
        out, weights = super().forward(hidden_states, *args, **kwargs)
        record = kwargs.get("msa_record")
        if learns and record is not None:
            loss = record.losses[self.layer_idx]
            self.msa_index_loss = loss.detach()
            out = _Attached.apply(out, self.msa_loss_weight * loss) if attach else out
        return out, weights


class M3IndexerMixin:
    """Before the indexer class of transformers: scores every key at once there, nothing here.

    The layer has read the index off its projections already (`M3Room.read`).
    """

    def forward(self, *args, **kwargs) -> None:
        return None


class M3ModelMixin(MSAModelMixin):
    """Before the class of a MiniMax-M3 with a language model head, of the same name."""

    def __init__(self, config, *args, **kwargs):
        super(MSAModelMixin, self).__init__(config, *args, **kwargs)
        from openmsa.hf.m3 import give_classes

        give_classes(self)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; the weights are the checkpoint's own."""
        return super(MSAModelMixin, cls).from_pretrained(*args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        if attn_implementation not in (None, NAME):
            raise ValueError(
                f"attn_implementation={attn_implementation!r}: a model that openmsa.hf.enable was "
                f"called on attends by {NAME!r}; load it again for transformers' own attention"
            )
        return NAME

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        """generate never compiles: the layout of a batch is found outside of any graph."""
        return False

    def msa_attentions(self) -> list[MSAAttentionMixin]:
        """The attention modules of the sparse layers, in order."""
        return [module for module in super().msa_attentions() if module.msa_room.INDEX]

    @property
    def index_loss_weight(self) -> float:
        """The factor of the index loss; the layers hold it, for they may have to attach theirs."""
        return self.msa_attentions()[0].msa_loss_weight

    @index_loss_weight.setter
    def index_loss_weight(self, weight: float) -> None:
        for attention in self.msa_attentions():
            attention.msa_loss_weight = weight

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As in transformers, with a cache that is ours."""
        self._hold_index(kwargs)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: paged caches hold no index keys."""
        raise ValueError(
            "continuous batching (generate_batch, serving with it) has no place for index keys; "
            "use model.generate on a batch padded on the left, with its attention_mask"
        )

    def forward(self, *args, **kwargs):
        """As of a converted model (see `MSAModelMixin.forward`), and with static caches.

        Without labels, in training, the index learns from any loss made of `logits`: the index loss
        is attached to them, and `index_loss` in the output is a number to be logged.
        """
        kwargs.update(zip(type(self).msa_arguments, args))
        self._hold_index(kwargs)
        return super().forward(**kwargs)

    def _with_index_loss(self, out, record: LossRecord, share):
        """Without labels the caller makes a loss of the logits: ours is attached to them."""
        out = super()._with_index_loss(out, record, share)
        if out.loss is None and out.index_loss.requires_grad:
            weighed = self.index_loss_weight * share * out.index_loss.sum()
            out.logits = _Attached.apply(out.logits, weighed)
            out.index_loss = out.index_loss.detach()
        return out

    def _hold_index(self, kwargs: dict) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        for attention in super().msa_attentions():
            hold_index(cache, attention.layer_idx, attention.msa_room.INDEX)
