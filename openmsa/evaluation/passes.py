"""What one pass over a whole sequence costs: milliseconds, and memory beside the model's own.

prefill    forward without gradients, the cache filled, logits of the last token
training   forward, loss and backward, every weight that learns
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from openmsa.accounting import machine
from openmsa.evaluation.batches import last_logits_only
from openmsa.inference.timing import longer_positions

KINDS = ("prefill", "training")


@dataclass(frozen=True)
class PassTime:
    """One pass over `num_tokens` tokens, over `repeats` of them after one that is not counted.

    peak_bytes: memory above what was held before; None where the system does not say.
    """

    kind: str
    num_tokens: int
    median_ms: float
    fastest_ms: float
    peak_bytes: int | None
    repeats: int


def pass_time(model, num_tokens: int, *, kind: str = "prefill", repeats: int = 3) -> PassTime:
    """Time a pass of `kind` over random tokens, batch 1, in the model's present phase.

    Positions past what the model was made for are timed like any others. Raises ValueError for an
    unknown kind and for counts below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, value in (("num_tokens", num_tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(rows, (1, num_tokens), generator=generator).to(model.device)
    run = {"prefill": _prefill, "training": _train}[kind]
    was_training = model.training
    model.train(kind == "training")
    try:
        with longer_positions(model.config, num_tokens):
            peak = _peak_of(lambda: run(model, tokens), tokens.device)
            times = [
                _milliseconds(lambda: run(model, tokens), tokens.device) for _ in range(repeats)
            ]
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return PassTime(kind, num_tokens, statistics.median(times), min(times), peak, repeats)


@torch.no_grad()
def _prefill(model, tokens: torch.Tensor) -> None:
    model(tokens, use_cache=True, **last_logits_only(model))


def _train(model, tokens: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens, use_cache=False).loss.backward()


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _peak_of(run: Callable[[], None], device: torch.device) -> int | None:
    """Memory that `run` takes at its most; run twice, for the first one loads what stays."""
    run()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not machine.forget_peak():
        return None
    before = machine.resident_bytes()
    run()
    return max(0, machine.peak_bytes() - before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
