"""Handling a converted model: its phase, its parameters, and a look at what it attends to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from openmsa.hf.attention import AttentionCall
from openmsa.hf.model import MSAModelMixin
from openmsa.hf.room import Room
from openmsa.hf.rooms import MSARoom
from openmsa.mechanisms.msa import MSAConfig

DENSE = "dense"


def is_converted(model: nn.Module) -> bool:
    """Whether `model` was converted to any mechanism, or loaded from one that was."""
    return isinstance(_unwrapped(model), MSAModelMixin)


def mechanism_of(model: nn.Module) -> str:
    """ "msa", "nsa" ..., or "dense" for a model that is not converted."""
    return room_of(model).NAME if is_converted(model) else DENSE


def is_msa(model: nn.Module) -> bool:
    """Whether `model` was converted to MSA, or loaded from one that was."""
    return mechanism_of(model) == MSARoom.NAME


def has_index(model: nn.Module) -> bool:
    """Whether `model` was converted to a mechanism whose index learns from a loss of its own."""
    return is_converted(model) and room_of(model).INDEX


def room_of(model: nn.Module) -> Room:
    """The mechanism of a converted model. Raises ValueError for a dense model."""
    return _converted(model).msa_attentions()[0].msa_room


def config_of(model: nn.Module):
    """What it was converted with, whatever the mechanism. Raises ValueError for a dense model."""
    return room_of(model).config


def msa_config(model: nn.Module) -> MSAConfig:
    """What it was converted with.

    Raises ValueError for a dense model and for another mechanism's (see `config_of`).
    """
    config = config_of(model)
    if not isinstance(config, MSAConfig):
        raise ValueError(
            f"model was converted to {mechanism_of(model)}, not to MSA; ask openmsa.hf.config_of"
        )
    return config


def msa_layers(model: nn.Module) -> list[int]:
    """The numbers of its converted layers, ascending. Raises ValueError for a dense model."""
    return [attention.layer_idx for attention in _converted(model).msa_attentions()]


def set_phase(model: nn.Module, phase: str, *, index_loss_weight: float = 1.0) -> None:
    """Choose how the sparse layers attend and what the index learns from, in training.

    "dense": full attention, no index loss. "warmup": full attention, index loss over the whole
    prefix; only where the mechanism has an index.
    "sparse": attention as the mechanism has it, index loss (if any) on what it selects. After
    `convert` and loading: "sparse", 1.0.
    index_loss_weight: the factor of the layers' summed index loss beside the language model loss.
    Raises ValueError for a phase that the mechanism lacks, a negative weight and a model that is
    not converted.
    """
    room = room_of(model)
    if phase == "warmup" and phase not in room.PHASES:
        raise ValueError(
            f"phase 'warmup' trains an index by a loss of its own, and {room.NAME} has none; "
            f"phase must be one of {', '.join(room.PHASES)}"
        )
    if phase not in room.PHASES:
        raise ValueError(f"phase must be one of {', '.join(room.PHASES)}, got {phase!r}")
    if not index_loss_weight >= 0:
        raise ValueError(f"index_loss_weight must be at least 0, got {index_loss_weight}")
    converted = _converted(model)
    for attention in converted.msa_attentions():
        attention.msa_phase = phase
    converted.index_loss_weight = index_loss_weight


def added_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that the conversion added, as in `model.named_parameters()`."""
    added = set(room_of(model).ADDED)
    for name, parameter in model.named_parameters():
        if not added.isdisjoint(name.split(".")):
            yield name, parameter


def index_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every index branch, named as in `model.named_parameters()`.

    Nothing for a mechanism without an index.
    """
    return added_parameters(model) if room_of(model).INDEX else iter(())


def freeze_backbone(model: nn.Module, frozen: bool = True) -> None:
    """Train what the conversion added alone (the index), or (frozen=False) everything again.

    Raises ValueError for frozen=True where the mechanism adds nothing that could be trained, and
    for a model with adapters, which are what is trained.
    """
    if _unwrapped(model) is not model:
        raise ValueError(
            f"model is a {type(model).__name__}, whose adapters are what is trained; to train the "
            "index alone, put them on the index alone (target_modules of its config)"
        )
    added = {id(parameter) for _, parameter in added_parameters(model)}
    if frozen and not added:
        raise ValueError(
            f"{mechanism_of(model)} adds no parameters to a model, so nothing would be left to "
            "train; leave the backbone free"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in added or not frozen)


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
    """The converted model, also where peft has put adapters around it."""
    model = _unwrapped(model)
    if not isinstance(model, MSAModelMixin):
        raise ValueError(
            f"model is a {type(model).__name__}, which is not converted; call openmsa.hf.convert "
            "on it first"
        )
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
