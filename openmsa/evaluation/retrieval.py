"""Retrieval: does the model still find what was said long ago?

Tasks of `openmsa.training.retrieval` over length of context x depth of the asked line, generated
from a seed. The model writes the answer itself: greedy decoding with its cache, exactly as many
tokens as the answer has, nothing of the answer shown. An answer counts only if all of it is right.

    rate = correct / total       with its 95 % interval by Wilson, honest at 0, at 1 and for few
    examples

Prompts of a batch differ by a line of filler, so shorter ones are padded on the left and masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from openmsa.evaluation.batches import evaluating
from openmsa.training.retrieval import TASKS, make_example

SEEDS_APART = 1_000_003  # plans of different seeds share no example


@dataclass(frozen=True)
class RetrievalPlan:
    """Which examples are asked: every task at every length and depth, `examples_per_cell` each."""

    filler: str
    tasks: tuple[str, ...] = TASKS
    context_tokens: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    examples_per_cell: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "context_tokens", "depths"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")
        if self.examples_per_cell < 1:
            raise ValueError(f"examples_per_cell must be at least 1, got {self.examples_per_cell}")


@dataclass(frozen=True)
class RetrievalResult:
    """Exact matches per cell: `correct[task][length][depth]` out of `total` in every cell."""

    tasks: tuple[str, ...]
    context_tokens: tuple[int, ...]
    depths: tuple[float, ...]
    correct: dict[str, tuple[tuple[int, ...], ...]]
    total: int
    seed: int

    def counts(self, task: str, context_tokens: int | None = None) -> tuple[int, int]:
        """(correct, total) of a task over all depths, at one length or at all of them."""
        lengths = range(len(self.context_tokens))
        if context_tokens is not None:
            lengths = [self.context_tokens.index(context_tokens)]
        cells = [cell for length in lengths for cell in self.correct[task][length]]
        return sum(cells), self.total * len(cells)

    def rate(self, task: str, context_tokens: int | None = None) -> float:
        """Share of right answers, 0 to 1."""
        correct, total = self.counts(task, context_tokens)
        return correct / total

    def rows(self) -> list[dict]:
        """One row per task and length, with the 95 % interval, for tables and json."""
        rows = []
        for task in self.tasks:
            for length in self.context_tokens:
                correct, total = self.counts(task, length)
                low, high = wilson(correct, total)
                rows.append({"task": task, "context_tokens": length, "correct": correct})
                rows[-1] |= {"total": total, "rate": correct / total, "low": low, "high": high}
        return rows


@dataclass(frozen=True)
class Question:
    """One prompt in tokens, its answer, and the cell (task, length, depth) that it counts for."""

    cell: tuple[str, int, int]
    prompt: tuple[int, ...]
    answer: str
    answer_tokens: int


def evaluate_retrieval(
    model,
    tokenizer,
    plan: RetrievalPlan,
    *,
    batch_size: int = 16,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RetrievalResult:
    """Ask every question of the plan; greedy, exact match.

    Two models get the same questions from the same plan and tokenizer. `progress` is called with
    (questions done, questions in all). Raises ValueError for a context longer than the model
    allows, and whatever `make_example` refuses, before the first question is asked.
    """
    _check_lengths(model, plan, batch_size)
    asked = sorted(questions(plan, tokenizer), key=lambda q: (-len(q.prompt), q.answer_tokens))
    right: dict[tuple[str, int, int], int] = {}
    with evaluating(model, autocast_dtype):
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            for question, said in zip(batch, _answers(model, tokenizer, batch), strict=True):
                right[question.cell] = right.get(question.cell, 0) + is_answer(
                    said, question.answer
                )
            if progress is not None:
                progress(start + len(batch), len(asked))
    grid = {
        task: tuple(
            tuple(right[task, length, depth] for depth in range(len(plan.depths)))
            for length in range(len(plan.context_tokens))
        )
        for task in plan.tasks
    }
    shape = (plan.tasks, plan.context_tokens, plan.depths)
    return RetrievalResult(*shape, grid, plan.examples_per_cell, plan.seed)


def questions(plan: RetrievalPlan, tokenizer) -> list[Question]:
    """Every question of the plan in tokens; a tokenizer that opens texts with a token opens
    these.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    opening = [t for t in tokenizer.encode("")[:1] if t == tokenizer.bos_token_id]
    asked = []
    for task in plan.tasks:
        for length, context_tokens in enumerate(plan.context_tokens):
            for depth, place in enumerate(plan.depths):
                for number in range(plan.examples_per_cell):
                    example = make_example(
                        task,
                        context_tokens=context_tokens - len(opening),
                        depth=place,
                        seed=plan.seed * SEEDS_APART + number,
                        filler=plan.filler,
                        encode=encode,
                    )
                    prompt = (*opening, *encode(example.prompt))
                    size = len(encode(example.answer))
                    asked.append(Question((task, length, depth), prompt, example.answer, size))
    return asked


def is_answer(said: str, answer: str) -> bool:
    """Whether `said` is the answer: blanks around it are forgiven, a longer word or number is
    not.
    """
    said, answer = said.strip(), answer.strip()
    rest = said[len(answer) :]
    return said.startswith(answer) and not (rest[:1].isalnum() and answer[-1:].isalnum())


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a rate: (low, high), 95 % at the default z."""
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"correct={correct} must lie in 0 .. total={total}, and total be positive")
    rate = correct / total
    middle = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half))


def _answers(model, tokenizer, batch: Sequence[Question]) -> list[str]:
    """What the model writes after each prompt, cut to as many tokens as its answer has."""
    longest = max(len(question.prompt) for question in batch)
    pad = _pad_token(model, tokenizer)
    rows = [[pad] * (longest - len(q.prompt)) + list(q.prompt) for q in batch]
    input_ids = torch.tensor(rows, device=next(model.parameters()).device)
    lengths = torch.tensor([len(q.prompt) for q in batch], device=input_ids.device)
    real = torch.arange(longest, device=input_ids.device) >= longest - lengths[:, None]
    out = model.generate(
        input_ids,
        attention_mask=real.long(),
        max_new_tokens=max(question.answer_tokens for question in batch),
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
    )
    return [
        tokenizer.decode(row[longest : longest + question.answer_tokens], skip_special_tokens=True)
        for row, question in zip(out.tolist(), batch, strict=True)
    ]


def _pad_token(model, tokenizer) -> int:
    """Any valid id does: padded places are masked."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.eos_token_id)
    return next((c for c in candidates if isinstance(c, int)), 0)


def _check_lengths(model, plan: RetrievalPlan, batch_size: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and max(plan.context_tokens) > longest:
        raise ValueError(
            f"context_tokens={max(plan.context_tokens)} is longer than the {longest} tokens that "
            "the model allows; ask for shorter contexts"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
