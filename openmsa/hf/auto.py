"""Converted models in AutoConfig, AutoModelForCausalLM and AutoTokenizer.

Their classes are made from those of the base model: MSAQwen3Config and MSAQwen3ForCausalLM when
"qwen3" is first converted or loaded.
"""

from __future__ import annotations

import inspect
from functools import cache, wraps

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from openmsa.hf.classes import PREFIX, base_name, keep
from openmsa.hf.config import MODEL_TYPE, from_fields
from openmsa.hf.model import MSAModelMixin


class MSAConfigMixin:
    """What the configuration class of every converted model adds to that of its base model."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        from_fields(config_dict)
        return super().from_dict(config_dict, **kwargs)


class OpenMSAConfig(PreTrainedConfig):
    """What AutoConfig finds for "openmsa": it makes a configuration of the base model's kind."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """A configuration of the class made for "base_model_type".

        Raises ValueError for a type that transformers does not know as a causal language model,
        and for an "openmsa" dict that `from_fields` refuses.
        """
        return config_class(config_dict.get("base_model_type")).from_dict(config_dict, **kwargs)


@cache
def config_class(base_model_type: str) -> type:
    """MSAQwen3Config for "qwen3", known to AutoModelForCausalLM and AutoTokenizer from then on.

    Raises ValueError for a type that transformers does not know as a causal language model.
    """
    base_config, base_model = _base(base_model_type)
    namespace = {"model_type": MODEL_TYPE}
    made = type(PREFIX + base_config.__name__, (MSAConfigMixin, base_config), namespace)
    namespace = {"config_class": made, **_forward(base_model)}
    model = type(PREFIX + base_model.__name__, (MSAModelMixin, base_model), namespace)
    AutoModelForCausalLM.register(keep(made, __name__), keep(model, __name__), exist_ok=True)
    if base_config in TOKENIZER_MAPPING:
        TOKENIZER_MAPPING.register(made, TOKENIZER_MAPPING[base_config], exist_ok=True)
    _share_weight_layout(base_model, base_model_type)
    return made


def model_class(base_model_type: str) -> type:
    """MSAQwen3ForCausalLM for "qwen3"."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[config_class(base_model_type)]


def _base(base_model_type: str) -> tuple[type, type]:
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"base_model_type={base_model_type!r} is unknown to transformers "
            f"{transformers.__version__}; correct config.json, or install a version that knows it"
        )
    config = CONFIG_MAPPING[base_model_type]
    if config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"base_model_type={base_model_type!r} is not a causal language model; correct "
            "config.json"
        )
    model = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    return config, model[0] if isinstance(model, (tuple, list)) else model


def _forward(base: type) -> dict:
    """A forward with the base's signature: Trainer picks columns by it, generate checks by it."""

    @wraps(base.forward)
    def forward(self, *args, **kwargs):
        return MSAModelMixin.forward(self, *args, **kwargs)

    names = list(inspect.signature(base.forward).parameters)[1:]
    return {"forward": forward, "msa_arguments": tuple(names)}


def _share_weight_layout(base_model: type, base_model_type: str) -> None:
    """Weights that are stored otherwise than they are held (experts) are known by class name."""
    mapping = get_checkpoint_conversion_mapping(base_model.__name__)
    mapping = mapping or get_checkpoint_conversion_mapping(base_model_type)
    if mapping is not None:
        name = PREFIX + base_model.__name__
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


def __getattr__(name: str) -> type:
    """Make the class that pickle asks for in a process that has not made it yet."""
    base = getattr(transformers, base_name(name, __name__))
    if issubclass(base, PreTrainedConfig):
        return config_class(base.model_type)
    return model_class(base.config_class.model_type)


AutoConfig.register(MODEL_TYPE, OpenMSAConfig, exist_ok=True)
