"""What every evaluation does around a model: check the input, batch it, leave all as it was."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


@contextlib.contextmanager
def evaluating(model, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode, no gradients, autocast if a dtype is given; the training flag returns."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    autocast = torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        model.train(training)


def batches_of_equal_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of one length each, longest first: a lack of memory shows at once."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def last_logits_only(model) -> dict[str, int]:
    """Arguments that spare a model the logits of all tokens but the last, if it knows them."""
    accepted = inspect.signature(model.forward).parameters.values()
    knows = any(p.name == "logits_to_keep" or p.kind is p.VAR_KEYWORD for p in accepted)
    return {"logits_to_keep": 1} if knows else {}


def check_sequences(model, sequences: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The sequences as 1-D int64 tensors. Raises ValueError naming the first unusable one."""
    sequences = [torch.as_tensor(s).long() for s in sequences]
    if not sequences:
        raise ValueError("sequences is empty; give at least one sequence of tokens")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = getattr(model.config, "max_position_embeddings", None)
    for index, sequence in enumerate(sequences):
        name = f"sequences[{index}]"
        if sequence.dim() != 1 or len(sequence) < 2:
            shape = tuple(sequence.shape)
            raise ValueError(f"{name} must be one row of at least 2 tokens, got shape {shape}")
        if longest is not None and len(sequence) > longest:
            raise ValueError(f"{name} has {len(sequence)} tokens, the model allows {longest}")
        if not 0 <= int(sequence.min()) <= int(sequence.max()) < vocabulary:
            raise ValueError(
                f"{name} has ids outside 0 .. {vocabulary - 1}; use the tokenizer of this model"
            )
    return sequences
