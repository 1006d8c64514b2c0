"""Handling a converted model: its phase, its parameters, and a look at what it attends to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from openmsa.hf.attention import AttentionCall
from openmsa.hf.config import from_fields
from openmsa.hf.index_branch import MODULES
from openmsa.hf.model import MSAModelMixin
from openmsa.mechanisms.msa import PHASES, MSAConfig


def is_msa(model: nn.Module) -> bool:
    """Whether `model` was converted, or loaded from a converted one."""
    return isinstance(model, MSAModelMixin)


def msa_config(model: nn.Module) -> MSAConfig:
    """What it was converted with. Raises ValueError for a dense model."""
    return from_fields(vars(_converted(model).config))


def msa_layers(model: nn.Module) -> list[int]:
    """The numbers of its sparse layers, ascending. Raises ValueError for a dense model."""
    return [attention.layer_idx for attention in _converted(model).msa_attentions()]


def set_phase(model: nn.Module, phase: str, *, index_loss_weight: float = 1.0) -> None:
    """Choose how the sparse layers attend and what the index learns from, in training.

    "dense": full attention, no index loss. "warmup": full attention, index loss over the whole
    prefix.
    "sparse": attention over the selected blocks, index loss on them. After `convert` and loading:
    "sparse", 1.0.
    index_loss_weight: the factor of the layers' summed index loss beside the language model loss.
    Raises ValueError for an unknown phase, a negative weight and a model that is not converted.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    if not index_loss_weight >= 0:
        raise ValueError(f"index_loss_weight must be at least 0, got {index_loss_weight}")
    for attention in _converted(model).msa_attentions():
        attention.msa_phase = phase
    model.index_loss_weight = index_loss_weight


def index_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every index branch, named as in `model.named_parameters()`."""
    for name, parameter in _converted(model).named_parameters():
        if any(f".{module}." in name for module in MODULES):
            yield name, parameter


def freeze_backbone(model: nn.Module, frozen: bool = True) -> None:
    """Train the index alone, or (frozen=False) everything again."""
    index = {id(parameter) for _, parameter in index_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in index or not frozen)


@contextmanager
def capture_attention(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """A list that receives an AttentionCall for every call of every sparse layer, in order.

    Sequences of a padded batch come as one packed call. Raises ValueError for a dense model.
    """
    attentions = _converted(model).msa_attentions()
    calls: list[AttentionCall] = []
    for attention in attentions:
        attention.msa_calls = calls
    try:
        yield calls
    finally:
        for attention in attentions:
            attention.msa_calls = None


def _converted(model: nn.Module) -> MSAModelMixin:
    if not isinstance(model, MSAModelMixin):
        raise ValueError(
            f"model is a {type(model).__name__}, which is not converted; call openmsa.hf.convert "
            "on it first"
        )
    return model
