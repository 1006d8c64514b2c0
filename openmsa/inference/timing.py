"""What one generated token costs at a given context length.

The cache is filled by repeating the keys of a short real prefill: how long a token takes depends
on how many keys are cached, not on what they say, and a real prefill of every length would take
hours where dense attention is the subject.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

SEED_TOKENS = 64


@dataclass(frozen=True)
class DecodeTime:
    """Milliseconds of one token after `context_tokens` cached ones, over `steps` passes."""

    context_tokens: int
    median_ms: float
    fastest_ms: float
    steps: int


@torch.no_grad()
def decode_time(
    model: PreTrainedModel, context_tokens: int, *, steps: int = 16, warmup: int = 2
) -> DecodeTime:
    """Time `steps` single-token passes of `model`, dense or MSA, over a cache of `context_tokens`.

    Each model uses the cache that `generate` gives it; transformers' own copies all keys for every
    new token, ours does not, and both are part of what a token costs. Positions past what the
    model was trained for are timed like any others. Raises ValueError for counts below 1 and for a
    cache that does not keep every token (sliding windows).
    """
    for name, value in (("context_tokens", context_tokens), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    training = model.training
    model.eval()
    try:
        with longer_positions(model.config.get_text_config(), context_tokens + warmup + steps):
            cache = filled_cache(model, context_tokens)
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            times = [_one_token_ms(model, token, cache) for _ in range(warmup + steps)][warmup:]
    finally:
        model.train(training)
    return DecodeTime(context_tokens, statistics.median(times), min(times), steps)


@contextmanager
def longer_positions(config, wanted: int) -> Iterator[None]:
    """A converted model refuses positions that it was not made for; their time is asked here."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        config.max_position_embeddings = max(limit, wanted)
    try:
        yield
    finally:
        if limit is not None:
            config.max_position_embeddings = limit


@torch.no_grad()
def filled_cache(model: PreTrainedModel, context_tokens: int) -> DynamicCache:
    """A cache of `context_tokens` tokens: what a short prefill put there, over and over."""
    rows = model.get_input_embeddings().weight.shape[0]
    num_seed = min(SEED_TOKENS, context_tokens)
    tokens = torch.randint(rows, (1, num_seed), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config.get_text_config())
    _forward(model, tokens.to(model.device), cache)
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        if keys is None or keys.shape[-2] != num_seed or layer.is_sliding:
            raise ValueError(
                "this model's cache does not keep every token (sliding window); timing by context "
                "needs one that does"
            )
        if getattr(layer, "index_keys", None) is not None:
            layer.stage(_more(layer.index_keys, context_tokens - num_seed))
        layer.update(*(_more(rows, context_tokens - num_seed) for rows in (keys, values)))
    return cache


def _more(rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[..., num_tokens, dim]: the rows of [..., tokens, dim] over and over."""
    order = torch.arange(num_tokens, device=rows.device) % rows.shape[-2]
    return rows.index_select(-2, order)


def _one_token_ms(model, token: torch.Tensor, cache: DynamicCache) -> float:
    _wait(token.device)
    start = time.perf_counter()
    _forward(model, token, cache)
    _wait(token.device)
    return 1e3 * (time.perf_counter() - start)


def _forward(model, tokens: torch.Tensor, cache: DynamicCache) -> None:
    """One pass over a cache, under the name that this version of transformers gives it."""
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model(tokens, use_cache=True, logits_to_keep=1, **{named: cache})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
