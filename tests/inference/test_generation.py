"""Generation says what the model says, whatever the chunk; bad prompts stop at the door."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa import MSAConfig, hf
from openmsa.inference import Sampling, generate
from openmsa.training.byte_tokenizer import byte_tokenizer
from tests.hf.tiny import tiny_model

PROMPT = "the cat sat on the mat and the dog sat on "


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def sparse_model():
    """Two blocks of 4 tokens are kept: a tenth of what the tests read."""
    return hf.convert(tiny(), MSAConfig(block_size=4, top_k=2))


def tiny():
    return tiny_model(vocab_size=258, max_position_embeddings=128, eos_token_id=256)


def greedy(model, tokens: list[int], count: int) -> list[int]:
    """The definition: the whole sequence through the model, once per token, no cache."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens = [*tokens, int(logits.argmax())]
    return tokens


@pytest.mark.parametrize("kind", ["model", "sparse_model"])
@pytest.mark.parametrize("prefill_tokens", [1, 7, 16, 4096])
def test_every_prefill_chunk_gives_the_tokens_of_the_full_pass(
    request, tokenizer, kind, prefill_tokens
):
    model = request.getfixturevalue(kind)
    told = generate(model, tokenizer, PROMPT, max_new_tokens=9, prefill_tokens=prefill_tokens)
    prompt = list(PROMPT.encode())
    assert [*prompt, *told.tokens] == greedy(model, prompt, 9)
    assert told.prompt_tokens == len(prompt)


def test_the_sparse_model_reads_less_than_the_dense_one(model, sparse_model, tokenizer):
    """Else the tests above would compare one model with itself."""
    dense, sparse = (
        generate(m, tokenizer, PROMPT * 2, max_new_tokens=20) for m in (model, sparse_model)
    )
    assert dense.tokens != sparse.tokens


def test_streamed_pieces_join_to_the_text(model, tokenizer):
    pieces: list[str] = []
    sampling = Sampling(temperature=1.5, seed=3)
    told = generate(
        model, tokenizer, PROMPT, max_new_tokens=40, sampling=sampling, on_text=pieces.append
    )
    assert "".join(pieces) == told.text
    assert len(pieces) > 1


def test_a_character_of_several_bytes_is_handed_on_whole(model, tokenizer):
    from openmsa.inference.generation import _Streamer

    pieces: list[str] = []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for byte in "né€".encode():
        streamer.put(torch.tensor([byte]))
    streamer.put(torch.tensor([0xE2]))
    streamer.end()
    assert pieces == ["n", "é", "€", "\ufffd"]


def test_a_seed_repeats_its_text_and_leaves_the_callers_random_state(model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts = [
        generate(
            model, tokenizer, PROMPT, max_new_tokens=12, sampling=Sampling(temperature=2, seed=seed)
        ).tokens
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(3), expected)


def test_it_stops_at_the_end_of_text_and_keeps_the_mode(model, tokenizer):
    model.train()
    first = generate(model, tokenizer, PROMPT, max_new_tokens=1)
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = first.tokens[0]
    try:
        told = generate(model, tokenizer, PROMPT, max_new_tokens=30)
    finally:
        model.generation_config.eos_token_id = kept
    assert told.tokens == first.tokens and told.stopped_by == "end of text"
    assert first.stopped_by == "length" and math.isnan(first.token_ms)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ("x" * 120, {"max_new_tokens": 9}, "128 positions"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("x", {"prefill_tokens": 0}, "prefill_tokens=0"),
        ([5, 900], {}, "do not belong"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(model, tokenizer, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompt, **options)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(model, tokenizer):
    larger = byte_tokenizer()
    larger.add_tokens(["<one-more>"])
    with pytest.raises(ValueError, match="do not belong together"):
        generate(model, larger, "x")


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_refuses_what_is_no_distribution(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
