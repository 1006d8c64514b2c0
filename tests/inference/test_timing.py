"""Timing fills the cache to the asked length, in every layer, and times passes over it."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from openmsa.inference import decode_time
from openmsa.inference.timing import SEED_TOKENS, filled_cache

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


@pytest.mark.parametrize("context", [1, SEED_TOKENS - 1, SEED_TOKENS, 3 * SEED_TOKENS + 5])
def test_the_cache_holds_exactly_the_context(model, context):
    with torch.no_grad():
        cache = filled_cache(model, context)
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (1, 2, context, 8)
        assert torch.equal(layer.keys[..., -1, :], layer.keys[..., (context - 1) % SEED_TOKENS, :])


def test_a_token_takes_time_and_the_mode_is_kept(model):
    model.train()
    told = decode_time(model, 200, steps=3)
    assert 0 < told.fastest_ms <= told.median_ms
    assert (told.context_tokens, told.steps) == (200, 3)
    assert model.training


def test_a_cache_that_forgets_is_refused():
    config = MistralConfig(**SIZES, sliding_window=32)
    with pytest.raises(ValueError, match="sliding window"):
        decode_time(MistralForCausalLM(config), 100, steps=1)


@pytest.mark.parametrize("wrong", [{"context_tokens": 0}, {"context_tokens": 4, "steps": 0}])
def test_counts_below_one_are_refused(model, wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        decode_time(model, **wrong)
