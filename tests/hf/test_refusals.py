"""A model that cannot be converted is refused by naming the part, before anything is changed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import openmsa
from openmsa import hf
from tests.hf.tiny import SPARSE, logits, tiny_model, tiny_tokens

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 61}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
OTHERS = {
    "gpt2": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4},
        r"h.0.attn \(GPT2Attention\) has no q_proj",
    ),
    "phi3": ({}, r"\(Phi3Attention\) has no q_proj, k_proj, v_proj but o_proj, qkv_proj"),
    "deepseek_v3": (
        {**MLA, **EXPERTS, "v_head_dim": 16, "first_k_dense_replace": 1},
        r"\(DeepseekV3Attention\) has no k_proj, v_proj but q_a_proj",
    ),
    "gemma2": ({}, r"layer 0 \(Gemma2Attention\) hands softcap to its attention"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "hands s_aux to its attention"),
    "olmo2": ({}, r"q_norm normalises \(64,\) channels at once; only a norm per head \(16"),
    "hunyuan_v1_dense": ({}, "does more to its query than a norm per head and RoPE"),
    "smollm3": ({"no_rope_layers": [0, 1]}, r"layer 0 \(SmolLM3Attention\) does more to its query"),
    "bert": ({"is_decoder": True}, "has no list of its 2 decoder layers"),
    "mamba": ({}, "does not choose its attention function"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_cannot_be_converted_are_told_why(kind):
    fields, message = OTHERS[kind]
    config = AutoConfig.for_model(kind, **{**SIZES, **HEADS, **fields})
    model = AutoModelForCausalLM.from_config(config)
    before, implementation = dict(model.state_dict()), config._attn_implementation
    with pytest.raises(ValueError, match=message):
        hf.convert(model, SPARSE)
    assert not hf.is_msa(model)
    assert model.config._attn_implementation == implementation
    assert model.state_dict().keys() == before.keys()


def test_sliding_window_layers_are_refused_and_the_others_named():
    model = tiny_model("mistral", sliding_window=8)
    with pytest.raises(ValueError, match=r"sliding window of 8 tokens .* sliding_window=None"):
        hf.convert(model, SPARSE)
    fields = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    with pytest.raises(ValueError, match=r"layer 2 .* convert with layers=\(0, 1\)"):
        hf.convert(tiny_model("qwen3", **fields), SPARSE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": (0, 3)}, "layers names layer 3, but the model has 3 layers, 0 to 2"),
        ({"layers": ()}, "chooses no layer"),
        ({"d_index": 7}, "d_index=7 must be even and at most the head dim 16"),
        ({"d_index": 18}, "d_index=18 must be even and at most the head dim 16"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        hf.convert(tiny_model(), openmsa.MSAConfig(block_size=4, top_k=3, **config))


def test_arguments_are_checked():
    model = tiny_model()
    with pytest.raises(ValueError, match="init must be one of main, random, got 'mean'"):
        hf.convert(model, SPARSE, init="mean")
    with pytest.raises(ValueError, match=r"config must be an openmsa.MSAConfig, got dict"):
        hf.convert(model, {"block_size": 4})
    with pytest.raises(ValueError, match=r"already converted; call openmsa.hf.to_dense"):
        hf.convert(hf.convert(model, SPARSE), SPARSE)
    with pytest.raises(ValueError, match="model is a Linear, not a transformers model"):
        hf.convert(torch.nn.Linear(2, 2), SPARSE)
    with pytest.raises(ValueError, match="model is a Qwen3Model; only the causal language models"):
        hf.convert(AutoModel.from_config(tiny_model().config), SPARSE)


def test_head_counts_must_divide():
    model = tiny_model()
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(48, 3 * 16)
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn: q_proj gives 64 and k_proj 48 channels"
    ):
        hf.convert(model, SPARSE)


def test_weights_that_are_not_finite_are_named():
    model, ids = tiny_model(), tiny_tokens(1, 20)
    before = logits(model, ids)
    weight = model.model.layers[2].mlp.up_proj.weight.data
    good, weight[1, 1] = weight[1, 1].item(), float("inf")
    with pytest.raises(ValueError, match=r"weight model.layers.2.mlp.up_proj.weight holds a NaN"):
        hf.convert(model, SPARSE)
    weight[1, 1] = good
    assert torch.equal(logits(model, ids), before)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model().config)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is not loaded"):
        hf.convert(model, SPARSE)


def test_a_model_in_the_hands_of_accelerate_is_refused():
    model = tiny_model()
    model.forward = model.forward
    with pytest.raises(ValueError, match="already dispatched or prepared by accelerate"):
        hf.convert(model, SPARSE)
