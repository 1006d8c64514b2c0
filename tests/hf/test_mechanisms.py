"""Every mechanism in a transformers model: one body for all of them."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    StaticCache,
)

from openmsa import hf
from tests.hf.mechanisms import (
    EVERYTHING,
    LENGTHS,
    SMALL,
    WITH_INDEX,
    converted,
    direct,
    disturbed,
    sequences,
    with_layers,
)
from tests.hf.tiny import CACHE, logits, tiny_model, tiny_tokens

CLOSE = {"atol": 3e-5, "rtol": 1e-4}
every_mechanism = pytest.mark.parametrize("name", SMALL)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask.long()


def test_all_are_here():
    assert set(SMALL) - {"window and blocks"} == set(hf.ROOMS)


@every_mechanism
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_layer_is_the_direct_call(name, family):
    model, ids, outputs = converted(name, family), tiny_tokens(2, 45), []
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(lambda _, args, out: outputs.append(out[0]))
    with torch.no_grad(), hf.capture_attention(model) as calls:
        model(ids)
        made = direct(calls[1], attention, SMALL[name])
        expected = attention.o_proj(made.out.flatten(2))
    torch.testing.assert_close(outputs[0], expected, **CLOSE)
    if made.selection is not None:
        assert torch.equal(calls[1].selection.blocks, made.selection.blocks)
    assert hf.mechanism_of(model) == calls[1].room.NAME == name.split()[0]
    assert hf.config_of(model) == SMALL[name]


@every_mechanism
def test_few_tokens_are_not_the_dense_model(name):
    """Otherwise the other tests would see nothing."""
    model, ids = tiny_model(), tiny_tokens(2, 71)
    dense = logits(model, ids)
    sparse = logits(hf.convert(model, SMALL[name]), ids)
    assert (sparse[:, 40:] - dense[:, 40:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("name", EVERYTHING)
def test_keeping_everything_is_the_dense_model(name):
    model, ids = tiny_model(), tiny_tokens(2, 71)
    dense = logits(model, ids)
    torch.testing.assert_close(logits(hf.convert(model, EVERYTHING[name]), ids), dense, **CLOSE)


@every_mechanism
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_sequence_alone_and_goes_on_so(name, side):
    model, rows = converted(name), sequences()
    ids, mask = padded(rows, side)
    more, cache = tiny_tokens(len(rows), 5, seed=9), DynamicCache()
    at = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, ids, attention_mask=mask, position_ids=at, **{CACHE: cache})
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    at = (longer.cumsum(1) - 1)[:, -5:]
    rest = logits(model, more, attention_mask=longer, position_ids=at, **{CACHE: cache})
    for i, row in enumerate(rows):
        expected = logits(model, torch.cat([row, more[i]])[None])[0]
        torch.testing.assert_close(got[i][mask[i].bool()], expected[:-5], **CLOSE)
        torch.testing.assert_close(rest[i], expected[-5:], **CLOSE)


@every_mechanism
@pytest.mark.parametrize("layers", [None, (0, 2)], ids=["all", "mixed"])
def test_packed_sequences_are_each_alone(name, layers):
    model, rows = converted(name, config=with_layers(SMALL[name], layers)), sequences()
    assert hf.msa_layers(model) == list(layers or (0, 1, 2))
    batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    batch.pop("labels")
    got = logits(model, **batch)[0].split(LENGTHS)
    for part, row in zip(got, rows, strict=True):
        torch.testing.assert_close(part, logits(model, row[None])[0], **CLOSE)


@every_mechanism
@pytest.mark.parametrize("chunks", [(1,) * 40, (17, 1, 1, 5, 1, 15)], ids=["tokens", "chunks"])
def test_decoding_is_the_full_pass(name, chunks):
    model, ids = converted(name), tiny_tokens(2, 40)
    cache, start, parts = DynamicCache(), 0, []
    for size in chunks:
        parts.append(logits(model, ids[:, start : start + size], **{CACHE: cache}))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), **CLOSE)
    held = cache.layers[0].index_keys
    assert held.shape == (2, 40, 16) if name in WITH_INDEX else held is None


@every_mechanism
@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 4}])
def test_generate_tells_what_the_full_pass_tells(name, how):
    model, ids = converted(name), tiny_tokens(1, 11).repeat(1, 4)
    told = model.generate(ids, max_new_tokens=12, do_sample=False, **how)
    expected = ids
    for _ in range(12):
        best = logits(model, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], 1)
    assert torch.equal(told, expected)


@every_mechanism
def test_beams_of_a_left_padded_batch_are_those_of_each_prompt(name):
    model, rows = converted(name), [tiny_tokens(n, seed=n) for n in (31, 40, 22)]
    ids, mask = padded(rows, "left")
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    told = model.generate(ids, attention_mask=mask, **how)[:, 40:]
    for row, expected in zip(told, rows, strict=True):
        assert torch.equal(row, model.generate(expected[None], **how)[0, len(expected) :])


@every_mechanism
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_what_was_saved(name, dtype, tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    config, ids = with_layers(SMALL[name], (0, 2)), tiny_tokens(2, 40)
    model = disturbed(hf.convert(dense, config))
    model.save_pretrained(tmp_path / "sparse")
    stored = json.loads((tmp_path / "sparse" / "config.json").read_text())["openmsa"]
    assert stored.get("mechanism", "msa") == name.split()[0]
    assert ("mechanism" in stored) == (name != "msa")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto")
    assert loaded.dtype == dtype
    assert type(loaded) is type(model)
    assert hf.config_of(loaded) == config
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    empty = AutoModelForCausalLM.from_config(loaded.config)
    assert empty.state_dict().keys() == model.state_dict().keys()


@every_mechanism
def test_back_to_dense_is_the_model_it_was(name):
    model, ids = tiny_model(), tiny_tokens(2, 40)
    kind, before, names = type(model), logits(model, ids), list(model.state_dict())
    hf.convert(model, SMALL[name])
    assert hf.is_converted(model) and hf.is_msa(model) == (name == "msa")
    assert hf.has_index(model) == (name in WITH_INDEX)
    hf.to_dense(model)
    assert type(model) is kind and hf.mechanism_of(model) == "dense"
    assert list(model.state_dict()) == names
    assert not [n for n in vars(model.model.layers[0].self_attn) if n.startswith("msa")]
    assert torch.equal(logits(model, ids), before)


@every_mechanism
def test_a_copy_is_independent(name):
    model, ids = converted(name), tiny_tokens(1, 40)
    before, other = logits(model, ids), copy.deepcopy(model)
    hf.set_phase(other, "dense")
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model, ids), before)


@every_mechanism
def test_a_cache_that_a_dense_model_filled_goes_on_where_no_index_keys_are_missing(name):
    dense, ids, cache = tiny_model(), tiny_tokens(1, 40), DynamicCache()
    model = converted(name)
    logits(dense, ids[:, :30], **{CACHE: cache})
    if name in WITH_INDEX:
        with pytest.raises(ValueError, match="holds 30 tokens but no index keys"):
            logits(model, ids[:, 30:], **{CACHE: cache})
        return
    with torch.no_grad():
        first = model(ids[:, :30], use_cache=True)
        for layer, ours in zip(cache.layers, first[CACHE].layers, strict=True):
            layer.keys, layer.values = ours.keys, ours.values
    rest = logits(model, ids[:, 30:], **{CACHE: cache})
    torch.testing.assert_close(rest, logits(model, ids)[:, 30:], **CLOSE)


def test_an_index_derived_from_the_main_branch_finds_what_attention_finds():
    """DSA with an index head per query head: better than an index of random numbers."""
    from openmsa.evaluation.recall import evaluate_recall

    found = {}
    for init in ("main", "random"):
        model = hf.convert(tiny_model("llama"), SMALL["dsa"], init=init)
        found[init] = evaluate_recall(model, tiny_tokens(2, 80)).mean("captured_mass")
    assert found["main"] > found["random"] + 0.1


def test_numbers_that_do_not_fit_are_refused():
    from openmsa.mechanisms.dsa import DSAConfig

    with pytest.raises(ValueError, match=r"d_index=128 must be even .* DSAConfig\(d_index=16\)"):
        hf.convert(tiny_model(), DSAConfig())
    with pytest.raises(ValueError, match=r"index_heads=64 must divide the 4 query heads"):
        hf.convert(tiny_model(), DSAConfig(d_index=16))
    hf.convert(tiny_model(), DSAConfig(d_index=16), init="random")
    model = hf.convert(tiny_model(), SMALL["moba"])
    with pytest.raises(ValueError, match="converted to moba, not to MSA"):
        hf.msa_config(model)
    with pytest.raises(ValueError, match="names the mechanism 'mobius', which this version"):
        hf.OpenMSAConfig.from_dict(
            {"base_model_type": "qwen3", "openmsa": {"mechanism": "mobius"}, "vocab_size": 8}
        )


def test_caches_that_forget_keys_are_refused():
    model, ids = converted("moba"), tiny_tokens(1, 20)
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match=r"keeps all keys in their order, which StaticCache with"):
        logits(model, ids, **{CACHE: static})
    cache = DynamicCache()
    logits(converted("msa"), ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="20 tokens and index keys that would be lost for layer 0"):
        logits(model, ids, **{CACHE: cache})


def test_a_switch_by_length_needs_the_whole_sequence():
    with pytest.raises(ValueError, match="dense_below=1000 goes by the length of a whole sequence"):
        hf.room_of(converted("infllm2", config=EVERYTHING["infllm2"])).check_context()
    hf.room_of(converted("infllm2")).check_context()


def test_what_is_added_is_offloaded_and_pickled_like_the_rest(tmp_path):
    """NSA's weights of windows are parameters of the attention module itself."""
    model, ids = converted("nsa"), tiny_tokens(1, 40)
    model.save_pretrained(tmp_path / "sparse")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk", "model.layers.2": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", device_map=places, offload_folder=tmp_path / "offload"
    )
    for other in (loaded, pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), logits(model, ids))
