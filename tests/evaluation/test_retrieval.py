"""Retrieval: real greedy generation with a cache, exact match, honest intervals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import openmsa
from openmsa import hf
from openmsa.evaluation.retrieval import (
    RetrievalPlan,
    _answers,
    evaluate_retrieval,
    is_answer,
    questions,
    wilson,
)
from openmsa.training.byte_tokenizer import byte_tokenizer
from openmsa.training.retrieval import TASKS
from tests.hf.tiny import tiny_model

FILLER = "def area(width, height):\n    return width * height\n\nprint(area(3, 4))\n" * 20
PLAN = RetrievalPlan(FILLER, context_tokens=(150, 240), depths=(0.0, 1.0), examples_per_cell=2)
TOKENIZER = byte_tokenizer()


class Scripted(torch.nn.Module):
    """Answers every prompt by a rule; everything else about it is as evaluation needs it."""

    def __init__(self, answer_of):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(eos_token_id=None, max_position_embeddings=512)
        self.answer_of, self.masks = answer_of, []

    def generate(self, input_ids, *, attention_mask, max_new_tokens, do_sample, **kwargs):
        assert not do_sample and not self.training
        self.masks.append(attention_mask)
        rows = []
        for row, real in zip(input_ids, attention_mask.bool()):
            said = self.answer_of(TOKENIZER.decode(row[real]))[:max_new_tokens]
            rows.append(TOKENIZER.encode(said) + [257] * (max_new_tokens - len(said)))
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def right_answers():
    asked = questions(PLAN, TOKENIZER)
    return {TOKENIZER.decode(q.prompt): q.answer for q in asked}


def test_a_model_that_knows_every_answer_gets_all_and_one_that_knows_none_gets_none():
    known = right_answers()
    all_right = evaluate_retrieval(Scripted(known.get), TOKENIZER, PLAN, batch_size=5)
    all_wrong = evaluate_retrieval(Scripted(lambda prompt: "0000"), TOKENIZER, PLAN)
    for task in TASKS:
        assert all_right.counts(task) == (8, 8) and all_right.rate(task, 240) == 1.0
        assert all_wrong.counts(task) == (0, 8)
    assert all_right.correct["passkey"] == ((2, 2), (2, 2)) and all_right.total == 2


def test_right_answers_land_in_the_cell_they_belong_to():
    known = right_answers()

    def only_long_ones(prompt: str) -> str:
        return known[prompt] if len(prompt) > 160 else "never"

    result = evaluate_retrieval(Scripted(only_long_ones), TOKENIZER, PLAN)
    for task in TASKS:
        assert result.correct[task] == ((0, 0), (2, 2))
    rows = {(row["task"], row["context_tokens"]): row for row in result.rows()}
    assert rows["key_value", 240]["rate"] == 1.0 and rows["key_value", 240]["low"] < 0.6
    assert rows["key_value", 150]["correct"] == 0 and rows["key_value", 150]["high"] > 0.4


def test_half_an_answer_and_a_longer_answer_are_wrong():
    assert is_answer("4821", "4821") and is_answer(" 4821\n", "4821") and is_answer("4821.", "4821")
    assert not is_answer("482", "4821") and not is_answer("48210", "4821")
    assert not is_answer("x4821", "4821") and not is_answer("", "4821")


def test_questions_fit_their_context_and_depend_on_the_seed():
    asked = questions(PLAN, TOKENIZER)
    assert len(asked) == len(TASKS) * 2 * 2 * 2
    for question in asked:
        limit = PLAN.context_tokens[question.cell[1]]
        assert len(question.prompt) + question.answer_tokens <= limit
    assert asked == questions(PLAN, TOKENIZER)
    other = questions(RetrievalPlan(FILLER, seed=1), TOKENIZER)
    assert not {q.prompt for q in asked} & {q.prompt for q in other}


def test_a_tokenizer_that_opens_every_text_opens_these():
    opened = SimpleNamespace(
        bos_token_id=256,
        encode=lambda text, add_special_tokens=True: (
            [256] * add_special_tokens + TOKENIZER.encode(text)
        ),
    )
    asked = questions(PLAN, opened)
    assert all(q.prompt[0] == 256 and q.prompt.count(256) == 1 for q in asked)
    assert max(len(q.prompt) + q.answer_tokens for q in asked if q.cell[1] == 0) <= 150


def greedy(model, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Greedy decoding from whole forward passes: no cache, no batch, no padding."""
    tokens = torch.tensor([prompt])
    for _ in range(num_tokens):
        with torch.no_grad():
            best = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_padded_batch_says_what_each_prompt_alone_would(sparse):
    model = tiny_model("qwen3", vocab_size=258)
    if sparse:
        hf.convert(model, openmsa.MSAConfig(block_size=8, top_k=4))
    asked = questions(PLAN, TOKENIZER)[:7]
    assert len({len(q.prompt) for q in asked}) > 1, "the batch must need padding"
    said = _answers(model, TOKENIZER, asked)
    for question, text in zip(asked, said):
        alone = greedy(model, question.prompt, question.answer_tokens)
        assert text == TOKENIZER.decode(alone, skip_special_tokens=True)


def test_progress_reaches_the_end():
    steps = []
    model = Scripted(lambda prompt: "0")
    evaluate_retrieval(model, TOKENIZER, PLAN, batch_size=20, progress=lambda *at: steps.append(at))
    assert steps == [(20, 32), (32, 32)]


@given(st.integers(1, 200), st.data())
def test_the_interval_holds_the_rate_and_narrows_with_more_questions(total, data):
    correct = data.draw(st.integers(0, total))
    low, high = wilson(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    wide = wilson(10 * correct, 10 * total)
    assert wide[1] - wide[0] < high - low


def test_the_interval_is_the_textbooks():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_bad_plans_are_refused_before_work():
    model = Scripted(lambda prompt: "0")
    with pytest.raises(ValueError, match="longer than the 512"):
        evaluate_retrieval(model, TOKENIZER, RetrievalPlan(FILLER, context_tokens=(1024,)))
    with pytest.raises(ValueError, match="batch_size"):
        evaluate_retrieval(model, TOKENIZER, PLAN, batch_size=0)
    with pytest.raises(ValueError, match="depths is empty"):
        RetrievalPlan(FILLER, depths=())
    with pytest.raises(ValueError, match="examples_per_cell"):
        RetrievalPlan(FILLER, examples_per_cell=0)
    with pytest.raises(ValueError, match="not known"):
        evaluate_retrieval(model, TOKENIZER, RetrievalPlan(FILLER, ("sudoku",), (240,)))
    with pytest.raises(ValueError, match="total"):
        wilson(3, 2)
    assert not model.masks, "nothing was asked"
