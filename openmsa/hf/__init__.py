"""MSA for transformers: conversion and back, training phases, loading by AutoModelForCausalLM."""

from openmsa.hf.attention import AttentionCall
from openmsa.hf.auto import OpenMSAConfig
from openmsa.hf.cache import MSACacheLayer
from openmsa.hf.convert import convert, to_dense
from openmsa.hf.phases import (
    capture_attention,
    freeze_backbone,
    index_parameters,
    is_msa,
    msa_config,
    msa_layers,
    set_phase,
)

__all__ = [
    "AttentionCall",
    "MSACacheLayer",
    "OpenMSAConfig",
    "capture_attention",
    "convert",
    "freeze_backbone",
    "index_parameters",
    "is_msa",
    "msa_config",
    "msa_layers",
    "set_phase",
    "to_dense",
]
