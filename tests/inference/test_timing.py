"""Timing fills the cache to the asked length, in every layer, and times passes over it."""

from __future__ import annotations

import copy

import pytest
import torch

from openmsa import MSAConfig, hf
from openmsa.inference import decode_time
from openmsa.inference.timing import SEED_TOKENS, filled_cache
from tests.hf.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("context", [1, SEED_TOKENS - 1, SEED_TOKENS, 3 * SEED_TOKENS + 5])
def test_the_cache_holds_exactly_the_context(model, context):
    with torch.no_grad():
        cache = filled_cache(model, context)
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (1, 2, context, 16)
        assert torch.equal(layer.keys[..., -1, :], layer.keys[..., (context - 1) % SEED_TOKENS, :])


def test_the_index_keys_of_a_converted_model_grow_along(model):
    converted = hf.convert(copy.deepcopy(model), MSAConfig(block_size=4, top_k=2))
    with torch.no_grad():
        cache = filled_cache(converted, 150)
    for layer in cache.layers:
        assert layer.keys.shape[-2] == layer.index_keys.shape[-2] == 150
        assert torch.equal(layer.index_keys[:, 149], layer.index_keys[:, 149 - 2 * SEED_TOKENS])


def test_contexts_beyond_the_model_are_timed_and_its_limit_is_kept(model):
    converted = hf.convert(copy.deepcopy(model), MSAConfig(block_size=4, top_k=2))
    assert decode_time(converted, 300, steps=2).median_ms > 0
    assert converted.config.max_position_embeddings == 256


def test_a_token_takes_time_and_the_mode_is_kept(model):
    model.train()
    told = decode_time(model, 200, steps=3)
    assert 0 < told.fastest_ms <= told.median_ms
    assert (told.context_tokens, told.steps) == (200, 3)
    assert model.training


def test_a_cache_that_forgets_is_refused():
    with pytest.raises(ValueError, match="sliding window"):
        decode_time(tiny_model("mistral", sliding_window=32), 100, steps=1)


@pytest.mark.parametrize("wrong", [{"context_tokens": 0}, {"context_tokens": 4, "steps": 0}])
def test_counts_below_one_are_refused(model, wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        decode_time(model, **wrong)
