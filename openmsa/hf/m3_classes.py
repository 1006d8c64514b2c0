"""Classes made at run time for an enabled MiniMax-M3, each under the name that it had.

transformers goes by names: config.json's architectures, the renaming of a checkpoint's weights,
loss functions and the modules that a device map may not split. So a MiniMaxM3VLForCausalLM becomes
a subclass of the same name and module, and pickle rebuilds it from its base.
"""

from __future__ import annotations

import inspect
from functools import wraps
from importlib import import_module
from types import MethodType, ModuleType

from torch import nn

from openmsa.hf.m3_model import M3AttentionMixin, M3IndexerMixin, M3ModelMixin

MODELLING = "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl"
MODELS = ("MiniMaxM3VLForCausalLM", "MiniMaxM3SparseForConditionalGeneration")
ATTENTION, INDEXER = "MiniMaxM3VLAttention", "MiniMaxM3VLIndexer"
_MIXINS = {
    ATTENTION: M3AttentionMixin,
    INDEXER: M3IndexerMixin,
    **dict.fromkeys(MODELS, M3ModelMixin),
}
_MADE: dict[type, type] = {}


def modelling() -> ModuleType:
    """transformers' module of MiniMax-M3."""
    return import_module(MODELLING)


class _Rebuilt:
    """Pickled as its base and what it holds: by its name, pickle would find the base."""

    def __reduce_ex__(self, protocol):
        return _empty, (type(self).m3_base,), self.__dict__


def _empty(base: type) -> nn.Module:
    made = enabled_class(base)
    return made.__new__(made)


def enabled_class(base: type) -> type:
    """The subclass of an attention, indexer or model class of transformers' MiniMax-M3."""
    if base not in _MADE:
        mixin = _MIXINS[base.__name__]
        namespace = {"m3_base": base, "__module__": base.__module__}
        if mixin is M3AttentionMixin:
            namespace["rotate"] = staticmethod(modelling().apply_rotary_pos_emb)
        if mixin is M3ModelMixin:
            namespace |= _forward(base)
        _MADE[base] = type(base.__name__, (_Rebuilt, mixin, base), namespace)
    return _MADE[base]


def enable_class(module: nn.Module) -> None:
    """Give `module` its subclass, also where a hook of accelerate stands before its forward."""
    made = module.__class__ = enabled_class(type(module))
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(made.forward, module)


def _forward(base: type) -> dict:
    """A forward with the base's signature: Trainer picks columns by it, generate checks by it."""

    @wraps(base.forward)
    def forward(self, *args, **kwargs):
        return M3ModelMixin.forward(self, *args, **kwargs)

    names = list(inspect.signature(base.forward).parameters)[1:]
    return {"forward": forward, "msa_arguments": tuple(names)}
