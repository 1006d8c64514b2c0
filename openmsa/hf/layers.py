"""Converted layers come and go: their class, their room and the modules that it adds."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from openmsa.hf import checks
from openmsa.hf.attention import MSAAttentionMixin
from openmsa.hf.classes import attention_class, base_of
from openmsa.hf.config import sparse_layers
from openmsa.hf.derive import samples_of
from openmsa.hf.rooms import room_for


def make_sparse(model: PreTrainedModel, config: object, init: str = "random") -> None:
    """Give the chosen layers of `model` their class and what the mechanism of `config` adds.

    init: "main" derives it from the main branch, "random" starts it as the model starts its own
    modules.
    """
    every, room = checks.attentions(model), room_for(config)
    chosen = [every[layer] for layer in sparse_layers(config, len(every))]
    derived = init == "main" and room.INDEX
    samples = samples_of(model, chosen) if derived else [None] * len(chosen)
    for attention, sample in zip(chosen, samples, strict=True):
        attention.__class__ = attention_class(type(attention))
        attention.msa_room = room
        room.add(attention)
        if sample is None:
            room.start(attention, model._init_weights)
        else:
            room.derive(attention, sample)


def make_dense(attention: nn.Module) -> None:
    """Undo it for one layer: nothing of ours stays behind."""
    attention.msa_room.remove(attention)
    for name in [name for name in vars(attention) if name.startswith("msa")]:
        delattr(attention, name)
    attention.__class__ = base_of(attention, MSAAttentionMixin)
