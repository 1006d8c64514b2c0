"""Classes made at run time: attention and output of a converted model, from those of its base.

A Qwen3Attention becomes an MSAQwen3Attention, which is a Qwen3Attention still. Each class is made
once and lives in a module under its own name, so pickle finds it, in a new process as well.
"""

from __future__ import annotations

import sys
from dataclasses import field, make_dataclass
from importlib import import_module

import transformers
from torch import Tensor, nn
from transformers import modeling_outputs

from openmsa.hf.attention import MSAAttentionMixin

PREFIX = "MSA"


_MADE: dict[type, type] = {}  # a plain dict: torch.compile sees through it


def attention_class(base: type) -> type:
    """MSAQwen3Attention for Qwen3Attention."""
    if base not in _MADE:
        namespace = {"rotate": staticmethod(rotation_of(base))}
        made = type(PREFIX + base.__name__, (MSAAttentionMixin, base), namespace)
        _MADE[base] = keep(made, __name__)
    return _MADE[base]


def output_class(base: type) -> type:
    """The output class of a model with two more fields: lm_loss, and index_loss [sparse layers]."""
    if base not in _MADE:
        more = [(name, Tensor | None, field(default=None)) for name in ("lm_loss", "index_loss")]
        _MADE[base] = keep(make_dataclass(PREFIX + base.__name__, more, bases=(base,)), __name__)
    return _MADE[base]


def rotation_of(attention: type):
    """apply_rotary_pos_emb(q, k, cos, sin) of the module that defines `attention`, or None."""
    return getattr(sys.modules[attention.__module__], "apply_rotary_pos_emb", None)


def base_of(made: nn.Module, mixin: type) -> type:
    """The class that the class of `made` was made from: the one after the mixin."""
    order = type(made).__mro__
    return order[order.index(mixin) + 1]


def keep(made: type, module: str) -> type:
    """Let `made` be found under its name in `module`."""
    made.__module__ = module
    setattr(sys.modules[module], made.__name__, made)
    return made


def base_name(name: str, module: str) -> str:
    """ "Qwen3Attention" for "MSAQwen3Attention". Raises AttributeError for a name that is not
    ours.
    """
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return name.removeprefix(PREFIX)


def __getattr__(name: str) -> type:
    """Make the class that pickle asks for in a process that has not made it yet."""
    base = base_name(name, __name__)
    if hasattr(modeling_outputs, base):
        return output_class(getattr(modeling_outputs, base))
    config = getattr(transformers, base.removesuffix("Attention") + "Config")
    modelling = config.__module__.replace(".configuration_", ".modeling_")
    return attention_class(getattr(import_module(modelling), base))
