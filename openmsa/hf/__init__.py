"""Mechanisms for transformers: conversion and back, training phases, AutoModelForCausalLM."""

from openmsa.hf.attention import AttentionCall
from openmsa.hf.auto import OpenMSAConfig
from openmsa.hf.cache import MSACacheLayer
from openmsa.hf.context import split_context
from openmsa.hf.convert import convert, to_dense
from openmsa.hf.m3 import enable, last_index_loss
from openmsa.hf.phases import (
    added_parameters,
    capture_attention,
    config_of,
    freeze_backbone,
    has_index,
    index_parameters,
    is_converted,
    is_msa,
    mechanism_of,
    msa_config,
    msa_layers,
    room_of,
    set_phase,
)
from openmsa.hf.rooms import ROOMS

__all__ = [
    "ROOMS",
    "AttentionCall",
    "MSACacheLayer",
    "OpenMSAConfig",
    "added_parameters",
    "capture_attention",
    "config_of",
    "convert",
    "enable",
    "freeze_backbone",
    "has_index",
    "index_parameters",
    "is_converted",
    "is_msa",
    "last_index_loss",
    "mechanism_of",
    "msa_config",
    "msa_layers",
    "room_of",
    "set_phase",
    "split_context",
    "to_dense",
]
