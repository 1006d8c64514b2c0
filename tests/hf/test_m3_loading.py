"""Checkpoints of MiniMax-M3 in the layout it was released in, before and after enabling."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from openmsa import hf
from tests.hf.m3_tiny import ATTENTION, LEGACY, modelling, tiny_m3, tiny_m3_vision
from tests.hf.tiny import logits, tiny_tokens

RELEASED = ".self_attn.index_q_proj.weight"  # what transformers calls indexer.q_proj


def stored(folder) -> dict[str, torch.Tensor]:
    """Every weight of every file of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def as_released(folder) -> None:
    """Rewrite config.json with the keys of the released one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    for key in ATTENTION:
        if key.startswith("index_"):
            del text[key]
    del text["layer_types"], text["mlp_layer_types"]
    text |= {"sparse_attention_config": LEGACY, "moe_layer_freq": [0, 1, 1]}
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    tiny_m3_vision().save_pretrained(folder, max_shard_size="40KB")
    as_released(folder)
    return folder


def test_the_released_layout_loads_and_is_kept(checkpoint, tmp_path):
    names = stored(checkpoint)
    assert len(list(checkpoint.glob("*.safetensors"))) > 2
    assert any(name.endswith(RELEASED) for name in names)
    model = hf.enable(AutoModelForImageTextToText.from_pretrained(checkpoint))
    config, ids = hf.msa_config(model), tiny_tokens(1, 40)
    assert (config.block_size, config.top_k, config.d_index, config.layers) == (4, 3, 8, (1, 2))
    torch.testing.assert_close(logits(model, ids), logits(tiny_m3_vision(), ids))
    model.save_pretrained(tmp_path)
    again = stored(tmp_path)
    assert again.keys() == names.keys()
    assert all(torch.equal(again[name], names[name]) for name in names)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["MiniMaxM3SparseForConditionalGeneration"]
    assert saved["model_type"] == "minimax_m3_vl" and "openmsa" not in saved
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert "openmsa" not in type(theirs).__mro__[1].__module__
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids))


def test_an_enabled_class_loads_an_enabled_model(checkpoint):
    model = hf.enable(AutoModelForImageTextToText.from_pretrained(checkpoint))
    again = type(model).from_pretrained(checkpoint)
    assert hf.msa_layers(again) == [1, 2]
    assert torch.equal(logits(again, tiny_tokens(1, 40)), logits(model, tiny_tokens(1, 40)))


def test_a_text_model_comes_back_as_it_was_saved(tmp_path):
    model, ids = hf.enable(tiny_m3()), tiny_tokens(1, 40)
    expected = logits(model, ids)
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    tiny_m3().save_pretrained(plain)
    model.save_pretrained(ours)
    assert stored(ours).keys() == stored(plain).keys()
    again = AutoModelForCausalLM.from_pretrained(ours, attn_implementation="openmsa")
    assert type(again) is modelling.MiniMaxM3VLForCausalLM
    with pytest.raises(ValueError, match=r"call openmsa.hf.enable\(model\)"):
        again(ids)
    torch.testing.assert_close(logits(hf.enable(again), ids), expected)
