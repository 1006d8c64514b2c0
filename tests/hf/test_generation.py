"""generate: every block kept, the dense model's tokens; few, those of the full sparse pass."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StaticCache

from openmsa import hf
from tests.hf.tiny import CACHE, EVERYTHING, FAMILIES, SPARSE, logits, tiny_model, tiny_tokens

NEW = 18
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 4, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 7},
}


def tell(model, ids: torch.Tensor, **how) -> torch.Tensor:
    how = {"max_new_tokens": NEW, "do_sample": False, **how}
    return model.generate(
        ids, attention_mask=how.pop("attention_mask", torch.ones_like(ids)), **how
    )


def repetitive(rows: int = 1) -> torch.Tensor:
    """A prompt that prompt lookup finds its continuations in."""
    return tiny_tokens(rows, 11).repeat(1, 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_keeping_every_block_tells_what_the_dense_model_tells(family, way):
    model = tiny_model(family)
    ids = repetitive(1 if way == "prompt lookup" else 2)
    dense = tell(model, ids, **WAYS[way])
    assert torch.equal(tell(hf.convert(model, EVERYTHING), ids, **WAYS[way]), dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "way", ["greedy", "prompt lookup", "chunked prefill", "assisted", "itself"]
)
def test_sparse_decoding_tells_what_the_full_sparse_pass_tells(family, way):
    model, ids = hf.convert(tiny_model(family), SPARSE), repetitive()
    how = WAYS.get(way, {})
    if way == "assisted":
        how = {"assistant_model": tiny_model(family, seed=1)}
    if way == "itself":  # an assistant whose drafts are right until the window of its luck ends
        how = {"assistant_model": copy.deepcopy(model)}
    told = tell(model, ids, **how)
    expected = ids
    for _ in range(NEW):
        best = logits(model, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], 1)
    assert torch.equal(told, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_beams_are_scored_as_the_full_sparse_pass_scores_them(family):
    model, ids = hf.convert(tiny_model(family), SPARSE), tiny_tokens(2, 30)
    out = tell(
        model,
        ids,
        num_beams=4,
        length_penalty=1.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    told = logits(model, out.sequences)[:, 29:-1].log_softmax(-1)
    each = told.gather(-1, out.sequences[:, 30:, None]).squeeze(-1)
    torch.testing.assert_close(out.sequences_scores, each.sum(1) / NEW, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_left_padded_batch_tells_what_each_prompt_tells(family, beams):
    model = hf.convert(tiny_model(family), SPARSE)
    rows = [tiny_tokens(n, seed=n) for n in (31, 40, 22)]
    ids = torch.stack([torch.nn.functional.pad(row, (40 - len(row), 0)) for row in rows])
    told = tell(model, ids, attention_mask=(ids > 0).long(), num_beams=beams)[:, 40:]
    for row, expected in zip(told, rows, strict=True):
        assert torch.equal(row, tell(model, expected[None], num_beams=beams)[0, len(expected) :])


def test_sampling_draws_the_same_with_and_without_a_cache():
    model, ids = hf.convert(tiny_model(), SPARSE), tiny_tokens(2, 30)
    told = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        told.append(tell(model, ids, do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(*told)
    assert not torch.equal(told[0], tell(model, ids))


def test_a_conversation_goes_on_from_the_cache_that_generate_returned():
    model, ids = hf.convert(tiny_model(), SPARSE), tiny_tokens(1, 30)
    out = tell(model, ids, return_dict_in_generate=True)
    more = torch.cat([out.sequences, tiny_tokens(1, 5, seed=1)], 1)
    told = tell(model, more, **{CACHE: out[CACHE]})
    assert torch.equal(told, tell(model, more))


def test_a_static_cache_is_refused():
    model, ids = hf.convert(tiny_model(), SPARSE), tiny_tokens(1, 20)
    with pytest.raises(ValueError, match="cannot hold; pass DynamicCache"):
        tell(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="cannot hold; pass DynamicCache"):
        tell(model, ids, **{CACHE: StaticCache(config=model.config, max_cache_len=64)})
