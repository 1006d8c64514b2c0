"""Passes over whole sequences: what is run, what is left as it was, what is refused."""

from __future__ import annotations

import pytest
import torch

from openmsa import hf
from openmsa.evaluation import passes
from openmsa.evaluation.passes import KINDS, pass_time
from tests.hf.mechanisms import SMALL
from tests.hf.tiny import tiny_model, tiny_tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dense", "msa", "nsa"])
def test_the_model_is_as_it_was(name, kind):
    model, ids = tiny_model(num_hidden_layers=1), tiny_tokens(1, 40)
    if name != "dense":
        hf.convert(model, SMALL[name])
    with torch.no_grad():
        before = model(ids).logits
    time = pass_time(model, 37, kind=kind, repeats=2)
    assert (time.kind, time.num_tokens, time.repeats) == (kind, 37, 2)
    assert 0 < time.fastest_ms <= time.median_ms
    assert time.peak_bytes is None or time.peak_bytes >= 0
    assert not model.training and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_training_reaches_all_that_learns_and_prefill_nothing(monkeypatch):
    model, reached = hf.convert(tiny_model(num_hidden_layers=1), SMALL["msa"]), []
    kept = passes._train

    def train(model, tokens):
        kept(model, tokens)
        assert model.training
        reached.append({name for name, p in model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(passes, "_train", train)
    pass_time(model.train(), 37, kind="training", repeats=1)
    assert reached[-1] == {name for name, _ in model.named_parameters()}
    assert any("index" in name for name in reached[-1])
    assert model.training
    pass_time(model, 37, kind="prefill", repeats=1)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_lengths_past_what_the_model_was_made_for():
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=64)
    assert pass_time(model, 90, repeats=1).num_tokens == 90
    assert model.config.max_position_embeddings == 64


def test_memory_grows_with_the_length():
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=4096)
    short, long = (pass_time(model, n, kind="training", repeats=1) for n in (64, 2048))
    if short.peak_bytes is None:
        pytest.skip("this system does not say how much memory is held")
    logits = 2048 * model.config.vocab_size * 4
    assert long.peak_bytes > logits > short.peak_bytes


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"kind": "decode"}, "kind must be one of prefill, training, got 'decode'"),
        ({"num_tokens": 0}, "num_tokens=0 must be at least 1"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
    ],
)
def test_refuses(numbers, message):
    with pytest.raises(ValueError, match=message):
        pass_time(tiny_model(num_hidden_layers=1), **{"num_tokens": 5, **numbers})
