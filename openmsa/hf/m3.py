"""MiniMax-M3 of transformers made fast, correct and trainable, without a change to its files.

Its sparse layers select and attend by our operations, so no mask of t x s is ever made; padded and
packed batches are each sequence alone; decoding reads the selected blocks; in training, the index
learns from its KL. No weight is added or renamed: checkpoints stay what they are.
"""

from __future__ import annotations

import copy

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig

from openmsa.hf import m3_classes
from openmsa.hf.attention import NAME
from openmsa.hf.m3_model import M3ModelMixin
from openmsa.hf.m3_room import rooms_of

OLDEST, BEFORE = "5.17", "6"  # versions of transformers whose MiniMax-M3 is known


def enable(model: nn.Module) -> nn.Module:
    """Make a MiniMax-M3 attend as MSA is defined and its index learn, in place, and return it.

    model: a MiniMaxM3VLForCausalLM or MiniMaxM3SparseForConditionalGeneration, loaded or not, on
    one device or spread by device_map; or a peft model around one. Its config becomes a copy, its
    classes become subclasses of the same names, all weights stay the same objects.
    `set_phase`, `freeze_backbone`, `index_parameters`, `msa_layers`, `msa_config` and
    `capture_attention` work on it as on a converted model, and so does the output in training: the
    KL is in `loss`, with `index_loss` [sparse layers] and `lm_loss` beside it.
    A trainer that makes its loss of the logits, or of the backbone's hidden states (TRL), trains
    the index too: the KL is attached to what it reads, times index_loss_weight in every forward
    pass. Divide that by the number of micro-batches which such a trainer accumulates.

    Raises ValueError for any other model, a transformers before 5.17, a model without sparse
    layers and an index whose heads are not one per KV head.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, M3ModelMixin):
        _check(inner)
        _own_config(inner)
        give_classes(inner)
        m3_classes.enable_class(inner)
    return model


def last_index_loss(model: nn.Module) -> torch.Tensor | None:
    """The KL of every sparse layer in the last training pass, fp32 [sparse layers], to be logged.

    For trainers that do not hand the model's output on. None before the first training pass.
    Raises ValueError for a model that `enable` was not called on.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, M3ModelMixin):
        raise ValueError(f"model is a {type(inner).__name__}; call openmsa.hf.enable on it first")
    losses = [attention.msa_index_loss for attention in inner.msa_attentions()]
    if any(loss is None for loss in losses):
        return None
    return torch.stack([loss.to(losses[0].device) for loss in losses])


def give_classes(model: nn.Module) -> None:
    """Give every attention module of `model` its class and its room, and its indexer's class."""
    text = model.config.get_text_config()
    rooms = rooms_of(text)
    for module in list(model.modules()):
        if isinstance(module, getattr(m3_classes.modelling(), m3_classes.ATTENTION)):
            module.msa_room = rooms[module.layer_idx]
            m3_classes.enable_class(module)
            if module.msa_room.INDEX:
                m3_classes.enable_class(module.indexer)
            else:
                module.msa_phase = "dense"
    text._attn_implementation = NAME


def _check(model: nn.Module) -> None:
    found = transformers.__version__
    if not Version(OLDEST) <= Version(found) < Version(BEFORE):
        raise ValueError(
            f"transformers {found} is installed; enable needs transformers>={OLDEST},<{BEFORE}"
        )
    names = " or ".join(m3_classes.MODELS)
    known = tuple(getattr(m3_classes.modelling(), name) for name in m3_classes.MODELS)
    if type(model) not in known:
        raise ValueError(
            f"model is a {type(model).__name__}; enable takes a {names} (with its language model "
            "head, unwrapped); a dense model becomes sparse by openmsa.hf.convert"
        )
    config = model.config.get_text_config()
    if "minimax_m3_sparse" not in config.layer_types:
        raise ValueError(
            "model has no sparse layer: layer_types of its config names none "
            '"minimax_m3_sparse"; correct layer_types (or sparse_attention_config) in config.json'
        )
    if config.index_n_heads != config.num_key_value_heads:
        raise ValueError(
            f"index_n_heads={config.index_n_heads} must be num_key_value_heads="
            f"{config.num_key_value_heads}: each group of query heads has an index head of its own"
        )


def _own_config(model: nn.Module) -> None:
    """Exchange the config and those inside it for copies: another model may share the old ones."""
    old, made = model.config, copy.deepcopy(model.config)
    new = {id(old): made}
    for name, part in vars(old).items():
        if isinstance(part, PreTrainedConfig):
            new[id(part)] = getattr(made, name)
    for module in model.modules():
        if id(getattr(module, "config", None)) in new:
            module.config = new[id(module.config)]
