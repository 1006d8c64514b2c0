"""The vision-language model: images first, then text, by the same attention."""

from __future__ import annotations

import copy

import pytest
import torch

from openmsa import hf
from tests.hf.m3_tiny import IMAGE, picture, tiny_m3_vision
from tests.hf.test_generation import tell
from tests.hf.test_training import checkpointing, gradients
from tests.hf.tiny import logits, tiny_tokens


def prompt(tokens: int = 30, *, seed: int = 0) -> torch.Tensor:
    """Text with an image of four tokens in it."""
    ids = tiny_tokens(1, tokens, seed=seed)
    ids[ids >= IMAGE - 1] = 2
    ids[:, 7:11] = IMAGE
    return ids


def test_logits_are_those_of_transformers():
    eager, ids = tiny_m3_vision(), prompt()
    model = hf.enable(copy.deepcopy(eager))
    assert hf.msa_layers(model) == [1, 2]
    torch.testing.assert_close(logits(model, ids, **picture()), logits(eager, ids, **picture()))
    loaded = hf.enable(tiny_m3_vision(attention="openmsa"))
    torch.testing.assert_close(logits(loaded, ids, **picture()), logits(eager, ids, **picture()))


def test_generate_tells_what_transformers_tells():
    eager, ids = tiny_m3_vision(), prompt()
    model = hf.enable(copy.deepcopy(eager))
    for how in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        told = tell(model, ids, **picture(), **how)
        assert torch.equal(told, tell(eager, ids, **picture(), **how))


def test_a_left_padded_prompt_tells_what_it_tells_alone():
    model = hf.enable(tiny_m3_vision())
    ids = torch.nn.functional.pad(prompt(), (6, 0))
    told = tell(model, ids, attention_mask=(ids > 0).long(), **picture())
    assert torch.equal(told[:, 6:], tell(model, prompt(), **picture()))


def test_a_sequence_longer_than_the_text_model_is_refused():
    model = hf.enable(tiny_m3_vision(max_position_embeddings=32))
    with pytest.raises(ValueError, match="33 tokens is longer than the 32 positions"):
        model(tiny_tokens(1, 33))


def test_the_index_learns_beside_the_tower():
    model, ids = hf.enable(tiny_m3_vision()).train(), prompt(40)
    out = model(ids, labels=ids, **picture())
    assert out["index_loss"].shape == (2,)
    torch.testing.assert_close(out.loss, out["lm_loss"] + out["index_loss"].sum())
    out.loss.backward()
    expected = gradients(model)
    assert all(expected[name].abs().max() > 0 for name, _ in hf.index_parameters(model))
    assert expected["model.vision_tower.embeddings.proj.weight"].abs().max() > 0
    checkpointing(model, reentrant=False)
    model(ids, labels=ids, use_cache=False, **picture()).loss.backward()
    for name, gradient in gradients(model).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
