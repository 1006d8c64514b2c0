"""Text from a prompt, by transformers' own `generate`: checked at the door, prefilled in chunks,
streamed.

Chunks are exact. Attending over a cache is the same function with fewer queries, so a chunk only
bounds the memory: a forward pass sees `prefill_tokens` queries instead of the whole prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not a whole character yet


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest (temperature 0), or drawn with a seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature={self.temperature} is negative; 0 takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} must lie above 0 and be at most 1; 1 keeps every token"
            )


@dataclass(frozen=True)
class Generation:
    """What came out: text without special tokens, the tokens themselves, and what they cost."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped_by: str  # "end of text" or "length"
    first_token_s: float  # prefill and the first token
    token_ms: float  # mean of the tokens after the first; nan where there was only one


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    prefill_tokens: int = 2048,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt` (text, or token ids) by at most `max_new_tokens` tokens.

    `on_text` receives the text piece by piece, whole characters only; the pieces join to the
    returned text. Raises ValueError for an empty prompt, a prompt that with the new tokens
    exceeds the positions the model has, a tokenizer that does not fit the model, and counts below
    1.
    """
    sampling = sampling or Sampling()
    tokens = _checked_prompt(model, tokenizer, prompt, max_new_tokens, prefill_tokens)
    ends = _end_tokens(model, tokenizer)
    streamer = _Streamer(tokenizer, on_text or (lambda text: None))
    input_ids = torch.tensor([tokens], device=model.device)
    with _evaluating(model), _seeded(sampling.seed, model.device):
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            prefill_chunk_size=prefill_tokens,
            eos_token_id=ends or None,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else (ends or [0])[0],
            streamer=streamer,
            **_choice(sampling),
        )
    return streamer.told(len(tokens), ends)


def _checked_prompt(
    model, tokenizer, prompt, max_new_tokens: int, prefill_tokens: int
) -> list[int]:
    """The prompt as token ids, once everything that can be known beforehand is known to fit."""
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_tokens", prefill_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    tokens = list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
    if not tokens:
        raise ValueError("the prompt is empty; give at least one character to continue")
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokens) >= rows or len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens, the model {rows}: they do not belong "
            "together; load the tokenizer that was saved with the model"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(tokens) + max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens and {max_new_tokens} are to follow, but this "
            f"model has {limit} positions; shorten the prompt, ask for fewer tokens, or use one "
            "trained for longer contexts"
        )
    return tokens


def _choice(sampling: Sampling) -> dict:
    """The same choice in transformers' words."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    temperature, top_p = float(sampling.temperature), float(sampling.top_p)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def _end_tokens(model, tokenizer) -> list[int]:
    """Every token that ends a text, by the model's word or, where it has none, the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


@contextmanager
def _evaluating(model):
    """Dropout off and no graph, and the model's mode as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _seeded(seed: int, device: torch.device):
    """Draw from `seed` without disturbing the caller's random state."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Streamer(BaseStreamer):
    """Keeps the tokens and their times, and hands on text as soon as its characters are whole."""

    def __init__(self, tokenizer, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.times: list[float] = []  # of the prompt, then of each token
        # Tokens [_anchor, _shown) are decoded again with the new ones, for right joins.
        self._anchor = self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            return
        self.tokens += value.flatten().tolist()
        self._hand_on(whole_only=True)

    def end(self) -> None:
        self._hand_on(whole_only=False)

    def told(self, prompt_tokens: int, ends: list[int]) -> Generation:
        """The whole, once it has ended."""
        first, later = self.times[1], len(self.tokens) - 1
        return Generation(
            text=self._decode(0, len(self.tokens)),
            tokens=tuple(self.tokens),
            prompt_tokens=prompt_tokens,
            stopped_by="end of text" if self.tokens[-1] in ends else "length",
            first_token_s=first - self.times[0],
            token_ms=1e3 * (self.times[-1] - first) / later if later else float("nan"),
        )

    def _hand_on(self, whole_only: bool) -> None:
        text = self._decode(self._anchor, len(self.tokens))
        if whole_only and text.endswith(UNFINISHED):
            return
        piece = text[len(self._decode(self._anchor, self._shown)) :]
        self._anchor, self._shown = self._shown, len(self.tokens)
        if piece:
            self.on_text(piece)

    def _decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(self.tokens[start:stop], skip_special_tokens=True)
