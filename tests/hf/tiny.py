"""Tiny random dense models of four families, with contexts well beyond the budget."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import openmsa

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
VOCABULARY = 61
SPARSE = openmsa.MSAConfig(block_size=4, top_k=3)  # 12 tokens of contexts of 40 and more
EVERYTHING = openmsa.MSAConfig(block_size=4, top_k=64)
_NAMES = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"  # renamed in transformers 5.24


def tiny_model(family: str = "qwen3", *, seed: int = 0, **fields) -> PreTrainedModel:
    """A dense model in evaluation mode whose attention is far from uniform."""
    own = {"sliding_window": None} if family == "mistral" else {}
    if family == "llama":
        own = {"attention_bias": True}
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **own,
        **fields,
    }
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "_norm" in name:  # left at 0 and 1, they would hide mistakes
            torch.nn.init.normal_(parameter, 1.0 if "_norm" in name else 0.0, 0.3)
    return model.eval()


def tiny_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64, never the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, shape, generator=generator)


def logits(model, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    """Logits without a graph."""
    with torch.no_grad():
        return model(input_ids, **inputs).logits
