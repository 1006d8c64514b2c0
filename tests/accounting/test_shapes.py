"""Ready-made shapes against published sizes, and shapes read from a config.json."""

from __future__ import annotations

import json

import pytest

from openmsa.accounting import chips, shapes

# Billions of weights in all and met by a token, as the models are called.
PUBLISHED = {
    "msa-109b": (109, None),
    "minimax-m3": (428, 23),
    "llama3-8b": (8.03, 8.03),
    "llama3-70b": (70.6, 70.6),
    "qwen3-8b": (8.2, 8.2),
    "qwen3-32b": (32.8, 32.8),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "deepseek-v3.2": (671, 37),
}


@pytest.mark.parametrize("name", shapes.shapes())
def test_weights_are_as_published(name):
    shape = shapes.find(name)
    total, active = PUBLISHED[name]
    assert shape.total_weights / 1e9 == pytest.approx(total, rel=0.015)
    met = shape.layers * shape.attention_weights + shape.ffn_weights(1) + 2 * shape.head_weights
    if active:
        assert met / 1e9 == pytest.approx(active, rel=0.12)
    assert shape.source and shape.title


def config(tmp_path, **values):
    file = tmp_path / "model" / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values))
    return file


LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
M3 = {
    "text_config": {
        "hidden_size": 6144,
        "num_hidden_layers": 60,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 200064,
        "intermediate_size": 3072,
        "dense_intermediate_size": 12288,
        "shared_intermediate_size": 3072,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "moe_layer_freq": [0] * 3 + [1] * 57,
        "sparse_attention_config": {
            "sparse_attention_freq": [0] * 3 + [1] * 57,
            "sparse_index_dim": 128,
        },
    }
}
DEEPSEEK = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_head_dim": 128,
}


@pytest.mark.parametrize(
    ("values", "name"), [(LLAMA, "llama3-8b"), (M3, "minimax-m3"), (DEEPSEEK, "deepseek-v3.2")]
)
def test_a_config_json_gives_the_same_shape(tmp_path, values, name):
    file = config(tmp_path, **values)
    for given in (file, file.parent):
        shape = shapes.find(str(given))
        assert shape.name == "model"
        for field in ("total_weights", "attention_weights", "kv_width", "dense_attention_layers"):
            assert getattr(shape, field) == getattr(shapes.find(name), field), field
        assert shape.stored.kv_width == shapes.find(name).stored.kv_width
        assert shape.ffn_weights(5) == shapes.find(name).ffn_weights(5)


def test_configs_of_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    qwen = transformers.Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
    )
    qwen.save_pretrained(tmp_path / "qwen")
    found = shapes.find(str(tmp_path / "qwen"))
    assert found.total_weights == shapes.find("qwen3-30b-a3b").total_weights


def test_layers_that_a_conversion_left_dense_are_known(tmp_path):
    file = config(tmp_path, **LLAMA, openmsa={"layers": [2, 3, 4]})
    assert shapes.find(str(file)).dense_attention_layers == 29
    assert shapes.find(str(config(tmp_path, **LLAMA))).dense_attention_layers == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 5}, "h=32 heads do not divide into g=5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention' are not"),
        ({"num_local_experts": 8}, "lacks num_experts_per_tok"),
    ],
)
def test_what_a_config_lacks_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        shapes.find(str(config(tmp_path, **{**LLAMA, **change})))


def test_names_and_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="did you mean llama3-8b"):
        shapes.find("llama-8b")
    file = config(tmp_path)
    file.write_text("no json")
    with pytest.raises(ValueError, match="is no json"):
        shapes.find(str(file))
    file.write_text("[]")
    with pytest.raises(ValueError, match="a mapping"):
        shapes.find(str(file))


def test_chips_have_rates_and_sources():
    for chip in chips.chips().values():
        assert chip.title and chip.source
        assert 10e12 < chip.bf16_flops < 1e16 and 1e11 < chip.memory_rate < 1e14
        assert chip.matrix_rate(1) >= chip.matrix_rate(2) == chip.bf16_flops
    with pytest.raises(ValueError, match="did you mean h100"):
        chips.find("h1000")


def test_a_file_of_ones_own_adds_and_replaces(tmp_path):
    file = tmp_path / "mine.json"
    mine = {"bf16_flops": 1e14, "memory_rate": 1e12, "memory_bytes": 6e10}
    file.write_text(json.dumps({"chips": {"mine": mine, "h100": {**mine, "dollars_per_hour": 1}}}))
    found = chips.chips(file)
    assert found["mine"].dollars_per_hour is None and found["mine"].matrix_rate(1) == 1e14
    assert found["h100"].dollars_per_hour == 1 and found["h200"] == chips.find("h200")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no json"),
        ("{}", "holds no chips"),
        ('{"chips": {"x": 3}}', "x must be a mapping"),
        ('{"chips": {"x": {"bf16_flops": 1}}}', "missing .*memory_rate"),
        ('{"chips": {"x": {"flops": 1}}}', "unknown key 'flops'"),
        (
            '{"chips": {"x": {"bf16_flops": 0, "memory_rate": 1, "memory_bytes": 1}}}',
            "bf16_flops must be a number above 0",
        ),
        (
            '{"chips": {"x": {"bf16_flops": 1, "memory_rate": 1, "memory_bytes": 1, '
            '"fp8_flops": "a"}}}',
            "fp8_flops must be null or above 0",
        ),
    ],
)
def test_a_chip_file_with_a_fault_is_refused(tmp_path, text, message):
    file = tmp_path / "chips.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        chips.chips(file)
