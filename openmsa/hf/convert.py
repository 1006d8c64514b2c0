"""A dense model becomes sparse and back: in place, every other weight the same object."""

from __future__ import annotations

import copy

from transformers import PreTrainedConfig, PreTrainedModel

from openmsa.hf import checks
from openmsa.hf.attention import NAME
from openmsa.hf.auto import config_class, model_class
from openmsa.hf.classes import base_of
from openmsa.hf.config import as_fields, sparse_layers
from openmsa.hf.layers import make_dense, make_sparse
from openmsa.hf.model import MSAModelMixin
from openmsa.hf.rooms import room_for

STARTS = ("main", "random")


def convert(model: PreTrainedModel, config: object, *, init: str = "main") -> PreTrainedModel:
    """Make a dense causal language model sparse, in place, and return it.

    config: an openmsa.MSAConfig, or the config of any other mechanism in openmsa.hf.ROOMS. Every
    layer of `config.layers` (None: all) gets what the mechanism adds, for MSA an index branch. The
    classes of these layers and of the model become subclasses of what they were, model.config a
    copy of such a class; all weights stay the same objects. The phase is "sparse".
    init: "main" derives the index from the main branch, by running the model on a few random tokens
    (see openmsa.hf.derive): useful before any training. "random": as the model starts its own
    weights.

    Raises ValueError, before anything is changed, for a model that cannot be converted (naming the
    part that is missing or in the way), an already converted one, a config that does not fit it,
    and weights that are not finite.
    """
    if isinstance(model, MSAModelMixin) and hasattr(model.config, "openmsa"):
        raise ValueError("model is already converted; call openmsa.hf.to_dense first to start over")
    if init not in STARTS:
        raise ValueError(f"init must be one of {', '.join(STARTS)}, got {init!r}")
    room = room_for(config)
    checks.causal_lm(model)
    checks.loaded(model)
    every = checks.attentions(model)
    for layer in sparse_layers(config, len(every)):
        room.check(model, every[layer], init)
    checks.dense_layers(model, config)
    checks.finite_weights(model)

    kind = model.config.model_type
    make_sparse(model, config, init)
    model.msa_dense_attention = model.config._attn_implementation
    model.__class__ = model_class(kind)
    made = _own_config(model, config_class(kind))
    made.base_model_type, made.openmsa = kind, as_fields(config)
    made._attn_implementation = NAME
    return model


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The way back, in place: what was added is dropped, all else stays. Returns the model.

    Raises ValueError for a model that is not converted.
    """
    if not (isinstance(model, MSAModelMixin) and hasattr(model.config, "openmsa")):
        raise ValueError(f"model is a {type(model).__name__}, which is not converted")
    for attention in model.msa_attentions():
        make_dense(attention)
    dense_attention = vars(model).pop("msa_dense_attention", None)
    vars(model).pop("index_loss_weight", None)
    model.__class__ = base_of(model, MSAModelMixin)
    made = _own_config(model, model.config_class)
    del made.base_model_type, made.openmsa
    made.architectures = [type(model).__name__]
    made._attn_implementation = None
    model.set_attn_implementation(dense_attention or model.get_correct_attn_implementation(None))
    return model


def _own_config(model: PreTrainedModel, kind: type) -> PreTrainedConfig:
    """Exchange the config for a copy of class `kind`: another model may share the old one."""
    old = model.config
    made = copy.deepcopy(old)
    made.__class__ = kind
    vars(made).pop("model_type", None)  # a loaded config holds it once more, beside its class
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = made
    return made
