"""Prefill, chunks, decoding, generate and its caches: all tell what one full pass tells."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from openmsa import hf
from openmsa.inference import decode_time
from tests.hf.m3_tiny import tiny_m3
from tests.hf.test_generation import NEW, repetitive, tell
from tests.hf.tiny import CACHE, logits, tiny_tokens

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 7},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
}


@pytest.fixture(scope="module")
def model():
    return hf.enable(tiny_m3())


def made_cache(model, kind: str):
    if kind == "bare":
        return DynamicCache()
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=64)


@pytest.mark.parametrize("kind", ["bare", "dynamic", "static"])
@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunks_are_the_whole(model, kind, chunk):
    ids, cache = tiny_tokens(2, 50), made_cache(model, kind)
    parts = [logits(model, part, **{CACHE: cache}) for part in ids.split(chunk, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), atol=3e-5, rtol=1e-4)
    assert int(cache.get_seq_length()) == 50


def test_decoding_is_transformers_decoding_with_its_own_cache(model):
    eager, ids = tiny_m3(), tiny_tokens(2, 40)
    for kind in ("dynamic", "static"):
        caches = [made_cache(model, kind) for _ in range(2)]
        for part in ids.split([25, 1, 1, 13], 1):
            theirs, ours = (
                logits(m, part, **{CACHE: c}) for m, c in zip((eager, model), caches, strict=True)
            )
            torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_generate_tells_what_transformers_tells(model, way):
    ids = repetitive(1 if way == "prompt lookup" else 2)
    assert torch.equal(tell(model, ids, **WAYS[way]), tell(tiny_m3(), ids, **WAYS[way]))


@pytest.mark.parametrize("way", ["another", "itself"])
def test_assisted_generation_tells_what_the_full_pass_tells(model, way):
    ids = repetitive()
    assistant = hf.enable(tiny_m3(seed=1)) if way == "another" else copy.deepcopy(model)
    told, expected = tell(model, ids, assistant_model=assistant), ids
    for _ in range(NEW):
        best = logits(model, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], 1)
    assert torch.equal(told, expected)


def test_sampling_draws_the_same_with_every_cache(model):
    ids, told = tiny_tokens(2, 30), []
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        told.append(tell(model, ids, do_sample=True, top_k=0, **how))
    assert torch.equal(told[0], told[1]) and torch.equal(told[0], told[2])


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_a_left_padded_batch_tells_what_each_prompt_tells(model, how):
    rows = [tiny_tokens(n, seed=n) for n in (31, 40, 22)]
    ids = torch.stack([torch.nn.functional.pad(row, (40 - len(row), 0)) for row in rows])
    told = tell(model, ids, attention_mask=(ids > 0).long(), **how)[:, 40:]
    for row, expected in zip(told, rows, strict=True):
        assert torch.equal(row, tell(model, expected[None], **how)[0, len(expected) :])


def test_a_conversation_goes_on_from_the_cache_that_generate_returned(model):
    out = tell(model, tiny_tokens(1, 30), return_dict_in_generate=True)
    more = torch.cat([out.sequences, tiny_tokens(1, 5, seed=1)], 1)
    assert torch.equal(tell(model, more, **{CACHE: out[CACHE]}), tell(model, more))


def test_a_static_cache_can_be_cropped_and_used_again(model):
    ids, cache = tiny_tokens(1, 40), made_cache(model, "static")
    logits(model, ids, **{CACHE: cache})
    cache.crop(-9)
    again = logits(model, ids[:, 31:], **{CACHE: cache})
    torch.testing.assert_close(again, logits(model, ids)[:, 31:], atol=3e-5, rtol=1e-4)
    cache.reset()
    torch.testing.assert_close(logits(model, ids, **{CACHE: cache}), logits(model, ids))


def test_continuous_batching_says_what_to_use(model):
    with pytest.raises(ValueError, match="use model.generate on a batch padded on the left"):
        model.generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=2)


def test_a_quantised_cache_is_refused(model):
    class Other(type(DynamicCache().layer_class_to_replicate())):
        pass

    cache = DynamicCache(config=model.config)
    cache.layers[1] = Other()
    with pytest.raises(ValueError, match="layer 1 is sparse .* cannot hold; pass DynamicCache"):
        model(tiny_tokens(1, 20), **{CACHE: cache})


def test_a_token_is_timed_over_layers_with_and_without_an_index(model):
    assert decode_time(model, 100, steps=2, warmup=0).steps == 2
