"""Saved and loaded, pickled and copied: the same model, by `import openmsa.hf` alone."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import openmsa
from openmsa import hf
from tests.hf.tiny import FAMILIES, SPARSE, logits, tiny_model, tiny_tokens

NARROW = openmsa.MSAConfig(block_size=4, top_k=3, d_index=8, sink_blocks=1, layers=(0, 2))


def saved(folder: Path, family: str = "qwen3", config=SPARSE, dtype=torch.float32, **how):
    """A converted model with trained-looking index weights, and the folder it was saved to."""
    tiny_model(family).save_pretrained(folder / "dense")
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=dtype)
    model = hf.convert(dense, config)
    torch.manual_seed(7)
    for _, parameter in hf.index_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "sparse", **how)
    return model, folder / "sparse"


def assert_same_weights(one, other) -> None:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [SPARSE, NARROW], ids=["all", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_what_was_saved(tmp_path, family, config, dtype):
    model, folder = saved(tmp_path, family, config, dtype, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    ids = tiny_tokens(2, 40)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(loaded) is type(model)
    assert loaded.dtype == dtype
    assert not loaded.training
    assert hf.msa_config(loaded) == config
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert_same_weights(loaded, model)
    assert_same_weights(type(model).from_pretrained(folder, dtype="auto"), model)
    loaded.save_pretrained(folder / "again")
    first, second = (
        json.loads((f / "config.json").read_text()) for f in (folder, folder / "again")
    )
    assert first == second
    assert first["model_type"] == "openmsa"
    assert first["base_model_type"] == family


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_back_to_dense_after_loading(tmp_path, family):
    """Mixtral is stored expert by expert and held fused: that must follow the way back too."""
    fields = {"num_local_experts": 4} if family == "mixtral" else {}
    dense, ids = tiny_model(family, **fields), tiny_tokens(1, 40)
    expected = logits(dense, ids)
    hf.convert(dense, SPARSE).save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(loaded, ids), logits(dense, ids))
    hf.to_dense(loaded).save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(loaded, ids), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(again) is type(loaded)
    assert torch.equal(logits(again, ids), expected)


def test_converted_again_after_loading_and_going_back(tmp_path):
    _, path = saved(tmp_path)
    loaded = hf.to_dense(AutoModelForCausalLM.from_pretrained(path))
    assert loaded.config.model_type == "qwen3"
    again = hf.convert(loaded, SPARSE)
    assert hf.is_msa(again) and again.config.model_type == "openmsa"


def test_a_fresh_process_needs_the_import_alone(tmp_path):
    model, folder = saved(tmp_path)
    ids = tiny_tokens(1, 40)
    pickled, state = tmp_path / "model.pickle", tmp_path / "logits.pt"
    pickled.write_bytes(
        pickle.dumps((model, type(model), type(model.config), model.model.layers[0].self_attn))
    )
    torch.save(logits(model, ids), state)
    code = f"""
import pickle, torch
import openmsa.hf
from transformers import AutoModelForCausalLM
expected = torch.load({str(state)!r})
unpickled, kind, config, attention = pickle.loads(open({str(pickled)!r}, "rb").read())
weights = unpickled.state_dict()
loaded = AutoModelForCausalLM.from_pretrained({str(folder)!r})
ids = torch.tensor({ids.tolist()})
assert type(loaded) is type(unpickled) is kind and type(loaded.config) is config
assert type(attention) is type(loaded.model.layers[0].self_attn)
with torch.no_grad():
    assert all(torch.equal(weights[name], x) for name, x in loaded.state_dict().items())
    torch.testing.assert_close(loaded(ids).logits, expected)
    torch.testing.assert_close(unpickled(ids).logits, expected)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


def test_pickled_outputs_and_caches_come_back():
    model, ids = hf.convert(tiny_model(), SPARSE).train(), tiny_tokens(1, 20)
    with torch.no_grad():
        out = model(ids, labels=ids)
    again = pickle.loads(pickle.dumps(out))
    assert type(again) is type(out)
    assert torch.equal(again["index_loss"], out["index_loss"])


def test_built_from_a_config_and_from_meta():
    config = hf.convert(tiny_model(), NARROW).config
    made = AutoModelForCausalLM.from_config(config)
    assert hf.msa_layers(made) == [0, 2]
    attention = made.model.layers[0].self_attn
    assert attention.index_q_proj.weight.std() > 0.1  # initializer_range is 0.2
    assert torch.equal(attention.index_k_norm.weight, torch.ones(8))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert empty.model.layers[2].self_attn.index_k_proj.weight.shape == (8, 48)


def test_device_map_and_offloading_to_disk(tmp_path):
    model, folder = saved(tmp_path)
    ids = tiny_tokens(1, 40)
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk", "model.layers.2": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    told = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **told), model.generate(ids, **told))


def test_the_tokenizer_is_found_beside_the_model(tmp_path):
    _, folder = saved(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("b")["input_ids"] == [1]
    (folder / "tokenizer_config.json").unlink()  # then by the kind of the model
    assert AutoTokenizer.from_pretrained(folder)("b")["input_ids"] == [1]


def edited(folder: Path, **fields) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_type": "qwen33"}, "base_model_type='qwen33' is unknown to transformers"),
        ({"base_model_type": None}, "base_model_type=None is unknown"),
        ({"base_model_type": "clip"}, "base_model_type='clip' is not a causal language model"),
        ({"openmsa": {"block_sise": 4}}, "unknown key 'block_sise'; valid keys: block_size, top_k"),
        ({"openmsa": {"block_size": 0}}, "block_size must be a whole number of at least 1, got 0"),
        ({"openmsa": {"layers": [5]}}, "layers names layer 5, but the model has 3 layers"),
        ({"openmsa": None}, 'config.json has no "openmsa" dict'),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, fields, message):
    _, folder = saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(folder, **fields))


def test_weights_that_are_missing_or_not_finite_are_refused(tmp_path):
    model, folder = saved(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 12 index weights, the first is model.layers.0"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", config=AutoConfig.from_pretrained(folder)
        )
    model.model.layers[1].self_attn.index_k_proj.weight.data[0, 3] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"weight model.layers.1.self_attn.index_k_proj.weight holds"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_another_attention_function_is_refused(tmp_path):
    model, folder = saved(tmp_path)
    with pytest.raises(
        ValueError, match="attn_implementation='sdpa' would run the sparse layers dense"
    ):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="attn_implementation='eager' would run"):
        model.set_attn_implementation("eager")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' would run"):
        model(tiny_tokens(1, 10))


def test_loading_tells_what_it_did_when_asked(tmp_path):
    _, folder = saved(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert hf.is_msa(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
