"""Loss and perplexity by position in the context.

    loss[p]    = -ln P(token p | tokens 0 .. p-1)                    nats, fp32, p = 1 .. t-1
    bucket b   = the positions edges[b] <= p < edges[b+1]
    mean[b]    = sum of its losses / number of its tokens            perplexity = exp(mean)
    stderr[b]  = over sequences, of that ratio; tokens of one sequence are not independent

Two models are compared on the same tokens: the standard error is then that of the *difference*,
sequence by sequence, which is far smaller than the two errors apart because hard texts are hard
for both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from openmsa.evaluation.batches import (
    batches_of_equal_length,
    check_sequences,
    evaluating,
    last_logits_only,
)

LOGIT_BYTES = 64 << 20  # one chunk of fp32 logits; the loss needs about twice that on top


@dataclass(frozen=True)
class PositionLoss:
    """Losses of one model over some sequences, summed per sequence and bucket of positions.

    `edges` has one entry more than there are buckets. `loss_sums` (nats) and `token_counts` are
    [sequence][bucket]. `fingerprint` names the tokens, so that two results can only be compared
    if they are about the same ones.
    """

    edges: tuple[int, ...]
    loss_sums: tuple[tuple[float, ...], ...]
    token_counts: tuple[tuple[int, ...], ...]
    fingerprint: str

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Predicted tokens per bucket."""
        return tuple(sum(column) for column in zip(*self.token_counts, strict=True))

    @property
    def loss(self) -> tuple[float | None, ...]:
        """Mean loss per bucket in nats per token; None for a bucket without tokens."""
        return tuple(mean for mean, _ in _by_bucket(self.loss_sums, self.token_counts))

    @property
    def loss_stderr(self) -> tuple[float | None, ...]:
        """Standard error of `loss` over sequences; None with fewer than two sequences in the
        bucket.
        """
        return tuple(error for _, error in _by_bucket(self.loss_sums, self.token_counts))

    @property
    def perplexity(self) -> tuple[float | None, ...]:
        """exp(loss) per bucket."""
        return tuple(None if mean is None else math.exp(mean) for mean in self.loss)

    @property
    def mean_loss(self) -> float:
        """Mean loss over all predicted tokens, nats."""
        return ratio_and_error(_totals(self.loss_sums), _totals(self.token_counts))[0]

    @property
    def mean_loss_stderr(self) -> float | None:
        """Standard error of `mean_loss` over sequences."""
        return ratio_and_error(_totals(self.loss_sums), _totals(self.token_counts))[1]

    @property
    def mean_perplexity(self) -> float:
        """exp(mean_loss)."""
        return math.exp(self.mean_loss)

    def rows(self) -> list[dict]:
        """One row per bucket, for tables and json."""
        columns = zip(self.loss, self.loss_stderr, self.perplexity, self.num_tokens, strict=True)
        return [
            {
                "from_token": self.edges[b],
                "to_token": self.edges[b + 1] - 1,
                "loss": loss,
                "loss_stderr": error,
                "perplexity": perplexity,
                "tokens": tokens,
            }
            for b, (loss, error, perplexity, tokens) in enumerate(columns)
        ]


@dataclass(frozen=True)
class PairedDifference:
    """Loss of a candidate minus that of a reference, nats; per bucket and over all tokens."""

    edges: tuple[int, ...]
    difference: tuple[float | None, ...]
    stderr: tuple[float | None, ...]
    mean_difference: float
    mean_stderr: float | None

    @property
    def perplexity_change(self) -> float:
        """exp(mean_difference) - 1: 0.01 is a perplexity one per cent higher."""
        return math.expm1(self.mean_difference)

    @property
    def perplexity_change_stderr(self) -> float | None:
        """Its standard error, to first order."""
        if self.mean_stderr is None:
            return None
        return math.exp(self.mean_difference) * self.mean_stderr


def log_edges(num_tokens: int, *, first: int = 64) -> tuple[int, ...]:
    """Bucket edges 1, first, 2 first, 4 first ... num_tokens."""
    _check_edges_arguments(num_tokens, first, "first")
    edges = [1]
    while first < num_tokens:
        edges += [first] if first > 1 else []
        first *= 2
    return (*edges, num_tokens)


def even_edges(num_tokens: int, *, width: int = 128) -> tuple[int, ...]:
    """Bucket edges 1, width, 2 width ... num_tokens."""
    _check_edges_arguments(num_tokens, width, "width")
    return tuple(sorted({1, *range(width, num_tokens, width), num_tokens}))


@torch.no_grad()
def token_losses(model, input_ids: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Loss of every token but the first. input_ids [b, t] int -> [b, t-1] fp32, nats.

    The logits exist for `chunk_tokens` tokens at a time (default: as many as fit 64 MiB), so
    memory does not grow with t x vocabulary. A model whose head does more than one linear map (a
    soft cap, a scale) is noticed and gives its own logits.
    """
    states, last = _head_inputs(model, input_ids)
    head = model.get_output_embeddings()
    if states is None or head is None or not _agree(head(states[:, -1:]), last):
        logits = model(input_ids=input_ids, use_cache=False).logits
        head, states = torch.nn.Identity(), logits
    chunk = chunk_tokens or max(1, LOGIT_BYTES // (4 * last.shape[-1] * input_ids.shape[0]))
    losses = []
    for start in range(0, input_ids.shape[1] - 1, chunk):
        stop = min(start + chunk, input_ids.shape[1] - 1)
        logits = head(states[:, start:stop]).float()
        targets = input_ids[:, start + 1 : stop + 1]
        losses.append(cross_entropy(logits.mT, targets, reduction="none"))
    return torch.cat(losses, dim=1)


def position_loss(
    model,
    sequences: Tensor | Sequence[Tensor],
    *,
    edges: Sequence[int] | None = None,
    batch_size: int = 4,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PositionLoss:
    """Loss of any causal LM by position. sequences: [n, t] int or n tensors [t_i] int.

    `edges` default to `log_edges` of the longest sequence. Only sequences of one length share a
    batch, so there is no padding to disturb a block border. `progress` is called with (sequences
    done, sequences in all). The model's training flag is restored. Raises ValueError for a
    sequence shorter than two tokens, ids outside the vocabulary, or edges that do not ascend.
    """
    sequences = check_sequences(model, sequences)
    edges = tuple(edges) if edges is not None else log_edges(max(len(s) for s in sequences))
    if len(edges) < 2 or edges[0] < 1 or list(edges) != sorted(set(edges)):
        raise ValueError(
            f"edges must be at least two ascending positions from 1 up, got {edges}; "
            "the first token has no loss"
        )
    sums: list = [None] * len(sequences)
    counts: list = [None] * len(sequences)
    done, device = 0, next(model.parameters()).device
    with evaluating(model, autocast_dtype):
        for rows in batches_of_equal_length([len(s) for s in sequences], batch_size):
            batch = torch.stack([sequences[row] for row in rows]).to(device)
            losses = token_losses(model, batch).double().cpu()
            for row, loss in zip(rows, losses, strict=True):
                sums[row], counts[row] = _bucket(loss, edges)
            done += len(rows)
            if progress is not None:
                progress(done, len(sequences))
    return PositionLoss(edges, tuple(sums), tuple(counts), _fingerprint(sequences))


def compare(reference: PositionLoss, candidate: PositionLoss) -> PairedDifference:
    """Candidate minus reference, paired by sequence.

    Raises ValueError unless both results are about the same tokens in the same buckets.
    """
    if reference.fingerprint != candidate.fingerprint or reference.edges != candidate.edges:
        raise ValueError(
            "reference and candidate must be losses of the same tokens with the same edges, got "
            f"{reference.fingerprint} {reference.edges} and {candidate.fingerprint} "
            f"{candidate.edges}; evaluate both on one list of sequences"
        )
    differences = [
        [c - r for c, r in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(candidate.loss_sums, reference.loss_sums, strict=True)
    ]
    buckets = _by_bucket(differences, reference.token_counts)
    mean, error = ratio_and_error(_totals(differences), _totals(reference.token_counts))
    return PairedDifference(
        reference.edges, tuple(m for m, _ in buckets), tuple(e for _, e in buckets), mean, error
    )


def ratio_and_error(
    sums: Sequence[float], counts: Sequence[int]
) -> tuple[float | None, float | None]:
    """Ratio of two totals and its standard error over their parts; None if too few to tell."""
    parts = [(s, c) for s, c in zip(sums, counts, strict=True) if c > 0]
    if not parts:
        return None, None
    total = sum(c for _, c in parts)
    ratio = sum(s for s, _ in parts) / total
    if len(parts) < 2:
        return ratio, None
    spread = sum((s - ratio * c) ** 2 for s, c in parts)
    return ratio, math.sqrt(len(parts) / (len(parts) - 1) * spread) / total


def _head_inputs(model, input_ids: Tensor) -> tuple[Tensor | None, Tensor]:
    """What the head reads [b, t, width] (None if unseen) and the last logits [b, 1, vocabulary]."""
    seen = []
    backbone = model.base_model
    hook = backbone.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        last = model(input_ids=input_ids, use_cache=False, **last_logits_only(model)).logits[:, -1:]
    finally:
        hook.remove()
    is_state = len(seen) == 1 and seen[0].dim() == 3 and backbone is not model
    return (seen[0] if is_state else None), last


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    scale = theirs.float().abs().max()
    return bool((ours.float() - theirs.float()).abs().max() <= 1e-5 * scale)


def _bucket(loss: Tensor, edges: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """loss [t-1] of positions 1 .. t-1 -> its sums and its numbers of tokens per bucket."""
    parts = [loss[a - 1 : b - 1] for a, b in pairwise(edges)]
    return tuple(float(part.sum()) for part in parts), tuple(len(part) for part in parts)


def _by_bucket(sums, counts) -> list[tuple[float | None, float | None]]:
    columns = zip(zip(*sums, strict=True), zip(*counts, strict=True), strict=True)
    return [ratio_and_error(s, c) for s, c in columns]


def _totals(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(row) for row in rows]


def _fingerprint(sequences: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little") + sequence.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_edges_arguments(num_tokens: int, value: int, name: str) -> None:
    if num_tokens < 2:
        raise ValueError(
            f"num_tokens must be at least 2, got {num_tokens}; the first token has no loss"
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
