"""What one generated token costs at a given context length.

The cache is filled by repeating the keys of a short real prefill: how long a token takes depends
on how many keys are cached, not on what they say, and a real prefill of every length would take
hours where dense attention is the subject.
"""

from __future__ import annotations

import statistics
import time
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
    """Time `steps` single-token passes of `model`, dense or MSA, over a cache of `context_tokens`
    tokens.

    Positions past what the model was trained for are timed like any others; nothing is said about
    its answers there. Raises ValueError for counts below 1 and for a cache whose layers do not
    keep every token (sliding windows).
    """
    for name, value in (("context_tokens", context_tokens), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    training = model.training
    model.eval()
    try:
        cache = filled_cache(model, context_tokens)
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        times = [_one_token_ms(model, token, cache) for _ in range(warmup + steps)][warmup:]
    finally:
        model.train(training)
    return DecodeTime(context_tokens, statistics.median(times), min(times), steps)


def filled_cache(model: PreTrainedModel, context_tokens: int) -> DynamicCache:
    """A cache of `context_tokens` tokens: the keys and values of a short prefill, repeated."""
    rows = model.get_input_embeddings().weight.shape[0]
    num_seed = min(SEED_TOKENS, context_tokens)
    tokens = torch.randint(rows, (1, num_seed), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config.get_text_config())
    model(tokens.to(model.device), cache=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        for name, kept in list(vars(layer).items()):
            if torch.is_tensor(kept) and kept.dim() >= 3 and kept.shape[-2] == num_seed:
                setattr(layer, name, _repeated(kept, context_tokens))
    if cache.get_seq_length() != context_tokens or any(
        layer.keys.shape[-2] != context_tokens for layer in cache.layers
    ):
        raise ValueError(
            "this model's cache drops old tokens (sliding window); timing by context needs one "
            "that keeps them"
        )
    return cache


def _repeated(kept: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[..., tokens, dim] continued by itself to `num_tokens` tokens."""
    times = -(-num_tokens // kept.shape[-2])
    return torch.cat([kept] * times, dim=-2)[..., :num_tokens, :].contiguous()


def _one_token_ms(model, token, cache) -> float:
    _wait(token.device)
    start = time.perf_counter()
    model(token, cache=cache, use_cache=True)
    _wait(token.device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
