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
def test_init_main_takes_the_mean_of_the_heads(family):
    attention = hf.convert(tiny_model(family), SPARSE).model.layers[0].self_attn
    for name in ("weight", "bias"):
        q, k = getattr(attention.q_proj, name), getattr(attention.k_proj, name)
        assert (getattr(attention.index_q_proj, name) is None) == (q is None)
        if q is None:
            continue
        q, k = q.view(4, 16, -1), k.view(2, 16, -1)
        groups = torch.cat([(q[0] + q[1]) / 2, (q[2] + q[3]) / 2])
        index_q, index_k = attention.index_q_proj, attention.index_k_proj
        torch.testing.assert_close(getattr(index_q, name).view_as(groups), groups)
        torch.testing.assert_close(getattr(index_k, name).view_as(k[0]), (k[0] + k[1]) / 2)
    if family == "qwen3":
        assert torch.equal(attention.index_q_norm.weight, attention.q_norm.weight)
        assert attention.index_q_norm.weight is not attention.q_norm.weight


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_head_per_group_and_one_group_make_the_index_the_attention(family):
    """With a single head, the mean of the heads is the head: index scores are the logits."""
    model = tiny_model(family, num_attention_heads=1, num_key_value_heads=1, seed=3)
    hf.convert(model, SPARSE)
    with torch.no_grad(), hf.capture_attention(model) as calls:
        model(tiny_tokens(1, 40))
    for call in calls:
        torch.testing.assert_close(call.q_index, call.q)
        torch.testing.assert_close(call.k_index, call.k[:, :, 0])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("d_index", [2, 6, 8])
def test_a_narrow_index_turns_as_its_channels_do(family, d_index):
    """Moving every token by 7 positions changes no index score; a wrong pairing of RoPE would."""
    config = openmsa.MSAConfig(block_size=4, top_k=3, d_index=d_index)
    model, ids = hf.convert(tiny_model(family), config), tiny_tokens(1, 40)
    scores, position = [], torch.arange(40)[None]
    for moved in (0, 7):
        with torch.no_grad(), hf.capture_attention(model) as calls:
            model(ids, position_ids=position + moved)
        assert calls[0].q_index.shape == (1, 40, 2, d_index)
        scores.append(torch.einsum("btgi,bsi->bgts", calls[0].q_index, calls[0].k_index))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


def test_a_narrow_index_is_a_part_of_the_attention():
    """One head: its score is the part of the logit that the kept pairs make, on the same scale."""
    model = tiny_model("llama", num_attention_heads=1, num_key_value_heads=1)
    hf.convert(model, openmsa.MSAConfig(block_size=4, top_k=3, d_index=8))
    with torch.no_grad(), hf.capture_attention(model) as calls:
        model(tiny_tokens(1, 40))
    kept = [
        1,
        3,
        5,
        7,
        9,
        11,
        13,
        15,
    ]  # every second frequency and its partner, the slowest among them
    call = calls[0]
    part = torch.einsum("bthd,bshd->bhts", call.q[..., kept], call.k[..., kept]) * call.scale
    index = torch.einsum("btgi,bsi->bgts", call.q_index, call.k_index) * call.index_scale
    torch.testing.assert_close(index, part, atol=1e-5, rtol=1e-4)


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
