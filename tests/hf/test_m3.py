"""An enabled MiniMax-M3 computes what transformers computes where transformers is right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from openmsa import hf
from openmsa.hf import m3
from tests.hf.m3_tiny import FULL, SPARSE, modelling, tiny_m3
from tests.hf.tiny import CACHE, logits, tiny_model, tiny_tokens
from tests.support import assert_as_good_as_eager

SHAPES = {
    "as released": {},
    "two local blocks": {"index_local_blocks": 2, "index_topk_blocks": 4},
    "all heads, one group": {"num_key_value_heads": 1, "index_n_heads": 1},
    "index as wide as the head": {"index_head_dim": 16, "index_block_size": 5},
    "sparse first": {"layer_types": [SPARSE, FULL, SPARSE]},
    "rope over the whole head": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def gradients(model, largest: dict[str, float]) -> torch.Tensor:
    """All of them in a row, each as a share of the largest number in its tensor."""
    found = {n: p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None}
    assert largest.keys() in (set(), found.keys())
    for name, gradient in found.items():
        largest.setdefault(name, float(gradient.abs().max()) or 1.0)
    return torch.cat([gradient / largest[name] for name, gradient in found.items()])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [50, 7])
def test_logits_and_gradients_are_as_good_as_those_of_eager(shape, tokens):
    ids = tiny_tokens(2, tokens)
    eager, truth = tiny_m3(**SHAPES[shape]), tiny_m3(attention="sdpa", **SHAPES[shape]).double()
    ours = hf.enable(copy.deepcopy(eager))
    found, largest = [], {}
    for model in (truth, eager, ours):  # in evaluation mode: no index loss
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        found.append((out.logits.detach(), gradients(model, largest)))
    for name, exact, theirs, mine in zip(("logits", "gradients"), *found, strict=True):
        assert_as_good_as_eager(mine, theirs, exact.double(), name)


def test_in_half_precision_a_sparse_layer_is_as_good_as_eagers():
    ids = tiny_tokens(2, 50)
    fields = {"num_hidden_layers": 1, "layer_types": [SPARSE], "mlp_layer_types": ["dense"]}
    eager = tiny_m3(**fields).to(torch.bfloat16)
    truth = tiny_m3(attention="sdpa", **fields).to(torch.bfloat16).double()
    ours = hf.enable(copy.deepcopy(eager))
    expected = logits(truth, ids)
    assert_as_good_as_eager(logits(ours, ids), logits(eager, ids), expected.double())


def test_right_padding_and_positions_change_nothing():
    eager = tiny_m3()
    ours, ids = hf.enable(copy.deepcopy(eager)), tiny_tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 27:] = 0
    expected = logits(eager, ids, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(logits(ours, ids, attention_mask=mask)[mask.bool()], expected)
    at = torch.arange(40)[None]
    torch.testing.assert_close(logits(ours, ids, position_ids=at), logits(eager, ids))


def test_enabling_changes_neither_weights_nor_names_nor_another_model():
    theirs = tiny_m3()
    other = modelling.MiniMaxM3VLForCausalLM(theirs.config)
    weights = dict(theirs.named_parameters())
    model = hf.enable(theirs)
    assert model is theirs and hf.enable(model) is model
    assert all(model.get_parameter(name) is weight for name, weight in weights.items())
    assert model.state_dict().keys() == other.state_dict().keys()
    assert type(model).__name__ == "MiniMaxM3VLForCausalLM"
    assert isinstance(model, modelling.MiniMaxM3VLForCausalLM)
    assert other.config._attn_implementation == theirs.config._attn_implementation.replace(
        "openmsa", "eager"
    )
    logits(other, tiny_tokens(1, 20))


def test_it_is_handled_as_a_converted_model():
    model, ids = hf.enable(tiny_m3()), tiny_tokens(1, 40)
    assert hf.is_msa(model) and hf.msa_layers(model) == [1, 2]
    config = hf.msa_config(model)
    assert (config.block_size, config.top_k, config.d_index, config.layers) == (4, 3, 8, (1, 2))
    names = [name for name, _ in hf.index_parameters(model)]
    assert len(names) == 8 and all(".self_attn.indexer." in name for name in names)
    with hf.capture_attention(model) as calls:
        logits(model, ids)
    assert [call.layer for call in calls] == [1, 2]
    assert calls[0].q_index.shape == (1, 40, 2, 8) and calls[0].k_index.shape == (1, 40, 8)
    assert calls[0].selection.blocks.shape == (1, 2, 40, 3)
    full = tiny_m3(layer_types=[FULL] * 3)
    full.load_state_dict(model.state_dict(), strict=False)
    hf.set_phase(model, "dense")
    torch.testing.assert_close(logits(model, ids), logits(full, ids))


def test_copies_and_pickles_stay_enabled():
    model, ids = hf.enable(tiny_m3()), tiny_tokens(1, 30)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and hf.msa_layers(other) == [1, 2]
        assert torch.equal(logits(other, ids), logits(model, ids))
    made = type(model)(model.config).eval()
    made.load_state_dict(model.state_dict())
    assert torch.equal(logits(made, ids), logits(model, ids))


def test_hooks_of_accelerate_stay_in_front():
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model, ids = tiny_m3(), tiny_tokens(1, 30)
    expected = logits(hf.enable(copy.deepcopy(model)), ids)
    for module in (model, model.model.layers[1].self_attn, model.model.layers[1].self_attn.indexer):
        hooks.add_hook_to_module(module, Counting())
    assert torch.equal(logits(hf.enable(model), ids), expected)
    assert Counting.calls == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            tiny_model,
            "is a Qwen3ForCausalLM; enable takes a MiniMaxM3VLForC.*convert",
        ),
        (lambda: tiny_m3().model, "is a MiniMaxM3VLTextModel; enable takes"),
        (lambda: torch.nn.Linear(2, 2), "is a Linear; enable takes"),
        (lambda: tiny_m3(layer_types=[FULL] * 3), "has no sparse layer: layer_types"),
        (lambda: tiny_m3(index_n_heads=1), "index_n_heads=1 must be num_key_value_heads=2"),
    ],
)
def test_what_cannot_be_enabled_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        hf.enable(make())


@pytest.mark.parametrize("version", ["5.16.1", "6.0.0"])
def test_versions_of_transformers_that_are_not_known_are_refused(version, monkeypatch):
    monkeypatch.setattr(m3.transformers, "__version__", version)
    with pytest.raises(ValueError, match=f"transformers {version} .* transformers>=5.17,<6"):
        hf.enable(tiny_m3())


def test_what_an_enabled_model_cannot_do_is_refused():
    model, ids = hf.enable(tiny_m3()), tiny_tokens(1, 20)
    with pytest.raises(ValueError, match="load it again for transformers' own attention"):
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="not converted"):
        hf.to_dense(model)
    with pytest.raises(ValueError, match="use openmsa.hf.capture_attention"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="257 tokens is longer than the 256 positions"):
        model(tiny_tokens(1, 257))
    with pytest.raises(ValueError, match=r"call openmsa.hf.enable\(model\)"):
        tiny_m3(attention="openmsa")(ids)
    with pytest.raises(ValueError, match=r"openmsa.hf.enable"):
        hf.convert(tiny_m3(), hf.msa_config(model))


def test_a_model_loaded_with_our_attention_is_enabled_as_any_other():
    model, ids = tiny_m3(attention="openmsa"), tiny_tokens(1, 40)
    assert torch.equal(logits(hf.enable(model), ids), logits(hf.enable(tiny_m3()), ids))


def test_a_cache_that_transformers_filled_is_continued():
    eager = tiny_m3()
    model, ids = hf.enable(copy.deepcopy(eager)), tiny_tokens(2, 40)
    with torch.no_grad():
        cache = eager(ids[:, :25], use_cache=True)[CACHE]
    torch.testing.assert_close(
        logits(model, ids[:, 25:], **{CACHE: cache}), logits(eager, ids)[:, 25:]
    )
