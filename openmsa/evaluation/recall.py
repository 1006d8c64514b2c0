"""Does the index choose the blocks that attention itself would choose? (arXiv:2606.13392, 5.2)

    P[i,n]   = mean over the group's heads of softmax(q[i] . k * scale) over the whole visible
    prefix, summed over block n                           the main branch's attention mass I*[i]
    = the forced blocks, then the best others by P, top_k in all           the oracle I[i]     =
    the index's selection block recall  = |I* and I| / |I*| score recall  = sum of P over I* and I
    / sum of P over I*       relative to the oracle's mass captured mass = sum of P over I
    oracle mass = sum of P over I*           of all attention

The oracle obeys the same rule of forced blocks as the index, so a forced block is a sure hit. Only
queries with more than top_k visible blocks count: for all others every block is selected and each
measure is 1. Teacher and index read the same hidden states: the model runs in its present phase,
and at each layer the index's choice is compared with that layer's own full attention over the
prefix, from the same queries and keys. In the sparse phase those states come from sparse layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa import hf
from openmsa.evaluation.batches import check_sequences
from openmsa.evaluation.captures import (
    as_mask,
    check_budget,
    run_and_look,
    selected_blocks,
    sequences_of,
)
from openmsa.hf.room import Budget

SCORE_BYTES = 64 << 20  # one chunk of fp32 attention scores; probabilities need as much again
MEASURES = ("block_recall", "score_recall", "captured_mass", "oracle_mass")


@dataclass(frozen=True)
class LayerRecall:
    """The four measures of one layer, one value per group, over `queries` queries that count."""

    layer: int
    block_recall: tuple[float, ...]
    score_recall: tuple[float, ...]
    captured_mass: tuple[float, ...]
    oracle_mass: tuple[float, ...]
    queries: int

    def mean(self, measure: str) -> float:
        """One of `MEASURES`, averaged over the groups."""
        values = getattr(self, measure)
        return sum(values) / len(values)


@dataclass(frozen=True)
class Recall:
    """Recall of every sparse layer of a model, and the budget it is about."""

    layers: tuple[LayerRecall, ...]
    block_size: int
    top_k: int

    def mean(self, measure: str) -> float:
        """One of `MEASURES`, averaged over layers and groups."""
        return sum(layer.mean(measure) for layer in self.layers) / len(self.layers)

    def rows(self) -> list[dict]:
        """One row per layer, averaged over groups, for tables and json."""
        return [
            {"layer": layer.layer, **{m: layer.mean(m) for m in MEASURES}, "queries": layer.queries}
            for layer in self.layers
        ]


def block_mass(q: Tensor, k: Tensor, rows: Tensor, *, scale: float, block_size: int) -> Tensor:
    """Attention mass per block, P above. q [t, h, d], k [s, g, d], rows int [m] -> fp32 [m, g, n].

    `rows` are the queries asked for, of one sequence whose queries are the last t of its s keys.
    Works through as many rows at a time as keep the scores [h, rows, s] within 64 MiB.
    """
    (t, h, _), (s, g, _) = q.shape, k.shape
    num_blocks = -(-s // block_size)
    chunk = max(1, SCORE_BYTES // (4 * h * s))
    keys = k.float().permute(1, 2, 0)  # [g, d, s]
    masses = [q.new_zeros(0, g, num_blocks, dtype=torch.float32)]
    for some in rows.split(chunk):
        queries = q[some].float().unflatten(1, (g, h // g)).permute(1, 2, 0, 3)  # [g, r, c, d]
        scores = queries.flatten(1, 2) @ keys * scale  # [g, r c, s]
        positions = (some + s - t).repeat(h // g)
        hidden = torch.arange(s, device=q.device) > positions[:, None]
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        mean = weights.unflatten(1, (h // g, -1)).mean(1)  # [g, c, s]
        mean = torch.nn.functional.pad(mean, (0, num_blocks * block_size - s))
        masses.append(mean.unflatten(-1, (num_blocks, block_size)).sum(-1).transpose(0, 1))
    return torch.cat(masses)


def oracle_blocks(
    mass: Tensor, positions: Tensor, *, block_size: int, top_k: int, local_blocks=1, sink_blocks=0
) -> Tensor:
    """The best blocks by mass, bool like mass [m, g, n]; positions int [m] of the queries.

    Forced blocks first, then by mass; equal masses go to the lower block number.
    """
    block = torch.arange(mass.shape[-1], device=mass.device)
    own = (positions // block_size)[:, None, None]
    forced = (block < sink_blocks) | (block > own - local_blocks)
    worth = mass.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))
    best = worth.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, True) & (block <= own)


def measure(mass: Tensor, oracle: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """The four measures per query. mass fp32, oracle and chosen bool, all [m, g, n] -> [m, g]
    each.
    """
    both = oracle & chosen
    oracle_mass = (mass * oracle).sum(-1)
    return {
        "block_recall": both.sum(-1) / oracle.sum(-1),
        "score_recall": (mass * both).sum(-1) / oracle_mass,
        "captured_mass": (mass * chosen).sum(-1),
        "oracle_mass": oracle_mass,
    }


def call_recall(
    call: hf.AttentionCall, budget: Budget, *, max_queries: int | None = None
) -> LayerRecall | None:
    """Recall of one captured attention call; None if no query has more than top_k visible blocks.

    `max_queries` evenly spaced ones per sequence are looked at (default: all that count).
    """
    blocks = selected_blocks(call, budget)
    groups, queries = blocks.shape[1], 0
    sums = {m: torch.zeros(groups, dtype=torch.float64, device=blocks.device) for m in MEASURES}
    scale = call.scale if call.scale is not None else call.q.shape[-1] ** -0.5
    forced = {"local_blocks": budget.local_blocks, "sink_blocks": budget.sink_blocks}
    chosen_by = {"top_k": budget.top_k, "block_size": budget.block_size, **forced}
    for row, at_q, at_k in sequences_of(call):
        q, k = call.q[row, at_q], call.k[row, at_k]
        rows = _counting_rows(q, k, budget.block_size * budget.top_k, max_queries)
        if not len(rows):
            continue
        mass = block_mass(q, k, rows, scale=scale, block_size=budget.block_size)
        if groups == 1:
            mass = mass.mean(1, keepdim=True)  # one choice for all KV heads
        oracle = oracle_blocks(mass, rows + len(k) - len(q), **chosen_by)
        chosen = as_mask(blocks[row, :, at_q][:, rows].transpose(0, 1), mass.shape[-1])
        for name, values in measure(mass, oracle, chosen).items():
            sums[name] += values.double().sum(0)
        queries += len(rows)
    if not queries:
        return None
    means = {name: tuple((total / queries).tolist()) for name, total in sums.items()}
    return LayerRecall(layer=call.layer, **means, queries=queries)


def evaluate_recall(
    model,
    sequences: Tensor | Sequence[Tensor],
    *,
    max_queries: int | None = None,
    batch_size: int = 4,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recall:
    """Recall of the index of every sparse layer, in the present phase, over some sequences.

    sequences: [n, t] int or n tensors [t_i] int. Layers are measured while the model runs, so one
    layer's queries and keys are held at a time. Raises ValueError for a model that is not
    converted and for sequences that all fit the budget, where every measure is trivially 1.
    """
    sequences = check_sequences(model, sequences)
    budget = check_budget(model, max(len(s) for s in sequences))
    found: dict[int, list[LayerRecall]] = {}

    def look(call: hf.AttentionCall) -> None:
        recall = call_recall(call, budget, max_queries=max_queries)
        if recall is not None:
            found.setdefault(call.layer, []).append(recall)

    run_and_look(model, sequences, look, batch_size, autocast_dtype, progress)
    layers = tuple(_pooled(found[layer]) for layer in sorted(found))
    return Recall(layers, budget.block_size, budget.top_k)


def probe(
    model,
    input_ids: Tensor,
    *,
    max_queries: int = 64,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Recall for a training log, from `max_queries` queries per sequence. input_ids [b, t] int.

    Keys "block_recall/layer_0", "score_recall/layer_0", "captured_mass/layer_0" ... and the means
    over layers "block_recall", "score_recall", "captured_mass". The phase is not changed and the
    training flag is put back. Raises ValueError as `evaluate_recall` does.
    """
    recall = evaluate_recall(
        model,
        input_ids,
        max_queries=max_queries,
        batch_size=len(input_ids),
        autocast_dtype=autocast_dtype,
    )
    logged = MEASURES[:3]
    values = {f"{m}/layer_{layer.layer}": layer.mean(m) for layer in recall.layers for m in logged}
    return values | {m: recall.mean(m) for m in logged}


def _counting_rows(q: Tensor, k: Tensor, budget: int, max_queries: int | None) -> Tensor:
    """Query rows of one sequence that see more blocks than the budget holds."""
    first = min(len(q), max(0, budget - (len(k) - len(q))))
    rows = torch.arange(first, len(q), device=q.device)
    if max_queries is not None and len(rows) > max_queries:
        rows = rows[torch.linspace(0, len(rows) - 1, max_queries, device=q.device).round().long()]
    return rows


def _pooled(parts: Sequence[LayerRecall]) -> LayerRecall:
    """The calls of one layer as one, weighted by their queries."""
    total = sum(part.queries for part in parts)
    means = {
        m: tuple(
            sum(part.queries * getattr(part, m)[group] for part in parts) / total
            for group in range(len(parts[0].block_recall))
        )
        for m in MEASURES
    }
    return LayerRecall(layer=parts[0].layer, **means, queries=total)
