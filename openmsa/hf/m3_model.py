"""What an enabled MiniMax-M3 adds to the classes of transformers: attention, indexer and model."""

from __future__ import annotations

from openmsa.hf.attention import NAME, MSAAttentionMixin
from openmsa.hf.m3_cache import hold_index
from openmsa.hf.model import MSAModelMixin
from openmsa.mechanisms.msa import MSAConfig


class M3AttentionMixin(MSAAttentionMixin):
    """Before the attention class of transformers: a cache of its kinds is continued in ours."""

    def forward(self, hidden_states, *args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        hold_index(cache, self.layer_idx, self.msa_room.INDEX)
        return super().forward(hidden_states, *args, **kwargs)


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

    def msa_config(self) -> MSAConfig:
        """What its configuration says about the index, in our names."""
        return self.msa_attentions()[0].msa_room.config

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
        """As of a converted model (see `MSAModelMixin.forward`), and with static caches."""
        kwargs.update(zip(type(self).msa_arguments, args))
        self._hold_index(kwargs)
        return super().forward(**kwargs)

    def _hold_index(self, kwargs: dict) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        for attention in super().msa_attentions():
            hold_index(cache, attention.layer_idx, attention.msa_room.INDEX)
