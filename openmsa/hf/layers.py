"""Sparse layers come and go: their class, their settings and their index branch."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from openmsa.hf import checks
from openmsa.hf.attention import MSAAttentionMixin
from openmsa.hf.classes import attention_class, base_of
from openmsa.hf.config import sparse_layers
from openmsa.hf.derive import derive_from_main, samples_of
from openmsa.hf.index_branch import add_index_branch, remove_index_branch, start_at_random
from openmsa.mechanisms.msa import MSAConfig


def make_sparse(model: PreTrainedModel, config: MSAConfig, init: str = "random") -> None:
    """Give the chosen layers of `model` their class and an index branch.

    init: "main" derives the index from the main branch, "random" starts it as the model starts its
    own modules.
    """
    every = checks.attentions(model)
    chosen = [every[layer] for layer in sparse_layers(config, len(every))]
    samples = samples_of(model, chosen) if init == "main" else [None] * len(chosen)
    for attention, sample in zip(chosen, samples, strict=True):
        d_index = checks.width(config, attention)
        attention.__class__ = attention_class(type(attention))
        attention.msa, attention.msa_d_index = config, d_index
        add_index_branch(attention, d_index)
        if sample is None:
            start_at_random(attention, model._init_weights)
        else:
            derive_from_main(attention, sample, d_index)


def make_dense(attention: nn.Module) -> None:
    """Undo it for one layer: nothing of ours stays behind."""
    remove_index_branch(attention)
    for name in [name for name in vars(attention) if name.startswith("msa")]:
        delattr(attention, name)
    attention.__class__ = base_of(attention, MSAAttentionMixin)
