"""A converted model is the dense one where it should be, and every weight of it is left alone."""

from __future__ import annotations

import copy

import pytest
import torch

import openmsa
from openmsa import hf
from tests.hf.tiny import EVERYTHING, FAMILIES, SPARSE, logits, tiny_model, tiny_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_block_is_the_dense_model(family):
    model, ids = tiny_model(family), tiny_tokens(2, 71)
    dense = logits(model, ids)
    hf.convert(model, EVERYTHING)
    torch.testing.assert_close(logits(model, ids), dense, atol=3e-5, rtol=1e-4)


def test_a_small_budget_is_not_the_dense_model():
    """Otherwise the other tests would see nothing."""
    model, ids = tiny_model(), tiny_tokens(2, 71)
    dense = logits(model, ids)
    sparse = logits(hf.convert(model, SPARSE), ids)
    torch.testing.assert_close(sparse[:, :12], dense[:, :12], atol=3e-5, rtol=1e-4)
    assert (sparse[:, 13:] - dense[:, 13:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_back_to_dense_is_the_model_it_was(family):
    model, ids = tiny_model(family), tiny_tokens(2, 40)
    kind, config, attention = type(model), type(model.config), type(model.model.layers[0].self_attn)
    before, fields = logits(model, ids), model.config.to_dict()
    weights = dict(model.named_parameters())
    hf.convert(model, SPARSE)
    assert hf.is_msa(model)
    assert isinstance(model, kind)
    assert all(dict(model.named_parameters())[name] is p for name, p in weights.items())
    back = hf.to_dense(model)
    assert back is model
    assert (type(model), type(model.config)) == (kind, config)
    assert type(model.model.layers[0].self_attn) is attention
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert {**model.config.to_dict(), "architectures": None} == {**fields, "architectures": None}
    assert not [n for n in vars(model.model.layers[0].self_attn) if n.startswith("msa")]
    assert torch.equal(logits(model, ids), before)
    hf.convert(model, SPARSE)  # and once more


def test_a_config_shared_by_two_models_stays_dense_for_the_other():
    first, second = tiny_model(), tiny_model(seed=1)
    second.config = first.config
    hf.convert(first, SPARSE)
    assert second.config.model_type == "qwen3"
    assert first.model.layers[0].self_attn.config is first.config is first.model.config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_is_the_formula_written_by_hand(family):
    model, ids = hf.convert(tiny_model(family), SPARSE, init="random"), tiny_tokens(1, 30)
    seen = {}
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: (
            seen.update(kwargs, hidden_states=(*args, None)[0]) if args else seen.update(kwargs)
        ),
        with_kwargs=True,
    )
    with torch.no_grad(), hf.capture_attention(model) as calls:
        model(ids)
        x, position = seen["hidden_states"], torch.arange(30)
        angles = position[:, None] * 10000.0 ** -(torch.arange(8) / 8)
        turn = torch.polar(torch.ones_like(angles), angles)
        expected = []
        for side, heads in (("q", 2), ("k", 1)):
            y = getattr(attention, f"index_{side}_proj")(x).view(1, 30, heads, 16)
            if family == "qwen3":
                gain = getattr(attention, f"index_{side}_norm").weight
                y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
            z = torch.complex(y[..., :8], y[..., 8:]) * turn[:, None]
            expected.append(torch.cat([z.real, z.imag], -1))
    call = calls[1]
    assert call.layer == 1
    torch.testing.assert_close(call.q_index, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(call.k_index, expected[1][:, :, 0], atol=1e-5, rtol=1e-4)
    scores = torch.einsum("btgi,bsi->bgts", *expected[:1], expected[1][:, :, 0])
    causal = torch.ones(30, 30).tril().bool()
    blocks = scores.masked_fill(~causal, -torch.inf)
    blocks = (
        torch.nn.functional.pad(blocks, (0, 2), value=-torch.inf).unflatten(-1, (-1, 4)).amax(-1)
    )
    blocks.scatter_(-1, (position // 4).view(1, 1, 30, 1).expand(1, 2, 30, 1), torch.inf)
    best = blocks.topk(3).indices.sort(-1).values
    assert torch.equal(call.selection.blocks[:, :, 12:], best[:, :, 12:].int())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_layers_left_dense_are_the_dense_layers(family, padded):
    """Layer 0 has no sparse layer before it: what it puts out is bit for bit what it was."""
    model, ids = tiny_model(family), tiny_tokens(2, 40)
    inputs = {}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :9] = 0
    with torch.no_grad():
        dense = model(ids, output_hidden_states=True, **inputs).hidden_states[1]
        hf.convert(model, openmsa.MSAConfig(block_size=4, top_k=3, layers=(1, 2)))
        assert hf.msa_layers(model) == [1, 2]
        mixed = model(ids, output_hidden_states=True, **inputs).hidden_states[1]
    real = slice(9 if padded else 0, None)
    assert torch.equal(mixed[:, real], dense[:, real])
    assert not hasattr(model.model.layers[0].self_attn, "index_q_proj")


def test_a_sliding_window_stays_with_the_layers_left_dense():
    fields = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    model, ids = tiny_model("qwen2", **fields), tiny_tokens(2, 50)
    assert model.config.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    dense = logits(model, ids)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    dense_padded = logits(model, ids, attention_mask=mask)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    told = model.generate(ids, attention_mask=mask, **greedy)
    hf.convert(model, openmsa.MSAConfig(block_size=4, top_k=64, layers=(0,)))
    close = {"atol": 3e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits(model, ids), dense, **close)
    padded = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(padded[mask.bool()], dense_padded[mask.bool()], **close)
    assert torch.equal(model.generate(ids, attention_mask=mask, **greedy), told)


def test_a_copy_is_independent():
    model, ids = hf.convert(tiny_model(), SPARSE), tiny_tokens(1, 40)
    before = logits(model, ids)
    other = copy.deepcopy(model)
    hf.set_phase(other, "dense")
    for _, parameter in hf.index_parameters(other):
        parameter.data.zero_()
    assert torch.equal(logits(model, ids), before)
    assert hf.msa_config(other) == SPARSE


def test_capture_shows_what_the_layer_attends_with():
    model, ids = hf.convert(tiny_model(), SPARSE), tiny_tokens(2, 30)
    outputs = []
    attention = model.model.layers[2].self_attn
    attention.register_forward_hook(lambda _, args, out: outputs.append(out[0]))
    with torch.no_grad(), hf.capture_attention(model) as calls:
        model(ids)
        assert [call.layer for call in calls] == [0, 1, 2]
        call = calls[2]
        out = openmsa.sparse_attention(
            call.q, call.k, call.v, call.selection, scale=call.scale, backend="reference"
        )
        out = attention.o_proj(out.flatten(2))
    torch.testing.assert_close(out, outputs[0])
    model(ids)
    assert len(calls) == 3
