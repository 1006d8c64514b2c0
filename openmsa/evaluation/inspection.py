"""What the index looks at, and whether a dense model will bear it.

selection map   prob[q, n] = share of the query tokens in block q that select key block n
                (arXiv:2606.13392, Figure 5), per layer and group
bearing         per layer of a dense model: the mass that the best blocks would capture at this
                budget (no index can pass it), and what an index derived from the model's own
                projections captures before any training
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import openmsa
from openmsa import hf
from openmsa.evaluation.batches import check_sequences
from openmsa.evaluation.captures import as_mask, run_and_look, selected_blocks, sequences_of
from openmsa.evaluation.recall import MEASURES, LayerRecall, evaluate_recall
from openmsa.hf.room import Budget

VERDICTS = ("ready", "train", "keep dense")


@dataclass(frozen=True)
class SelectionMap:
    """How often query blocks select key blocks.

    `probability[layer number in layers][group][query cell][key cell]`, 0 to 1, None for the future.
    A cell is `blocks_per_cell` blocks wide (1 unless the text has more blocks than cells); its
    value is the mean over them.
    """

    layers: tuple[int, ...]
    block_size: int
    top_k: int
    blocks_per_cell: int
    num_tokens: int
    probability: tuple


@dataclass(frozen=True)
class LayerBearing:
    """One layer of a dense model at a budget; mass is a share of all attention, 0 to 1."""

    layer: int
    oracle_mass: float
    captured_mass: float
    score_recall: float
    block_recall: float
    verdict: str


@dataclass(frozen=True)
class Bearing:
    """Will this model bear this budget? Verdicts per layer follow one rule.

    With the threshold m: oracle mass < m is "keep dense" (even the best blocks lose too much);
    else captured mass < m is "train" (the blocks exist, the index must learn to find them);
    else "ready" (the derived index finds them untrained).
    """

    layers: tuple[LayerBearing, ...]
    block_size: int
    top_k: int
    threshold: float
    queries: int

    @property
    def keep_dense(self) -> list[int]:
        """Layers to keep dense."""
        return [layer.layer for layer in self.layers if layer.verdict == "keep dense"]

    @property
    def convert(self) -> list[int]:
        """Layers to convert: what to give to `MSAConfig(layers=...)`."""
        return [layer.layer for layer in self.layers if layer.verdict != "keep dense"]

    def rows(self) -> list[dict]:
        """One row per layer, for tables and json."""
        return [dict(vars(layer)) for layer in self.layers]


def selection_map(
    model,
    sequences: Tensor | Sequence[Tensor],
    *,
    max_cells: int = 128,
    autocast_dtype: torch.dtype | None = None,
) -> SelectionMap:
    """What a converted model selects on some text, in its present phase.

    sequences: [n, t] int or n tensors of one length, averaged. Raises ValueError for a dense model,
    sequences of different lengths, max_cells below 2, and a mechanism or phase that selects
    nothing.
    """
    budget = _budget_of(model)
    sequences = check_sequences(model, sequences)
    num_tokens = len(sequences[0])
    if any(len(s) != num_tokens for s in sequences):
        raise ValueError("sequences must be of one length; cut them to the shortest")
    if max_cells < 2:
        raise ValueError(f"max_cells must be at least 2, got {max_cells}")
    num_blocks = -(-num_tokens // budget.block_size)
    blocks_per_cell = -(-num_blocks // max_cells)
    sums: dict[int, Tensor] = {}

    def look(call: hf.AttentionCall) -> None:
        blocks = selected_blocks(call, budget)
        for row, at_q, _ in sequences_of(call):
            counts = _counts(blocks[row, :, at_q], budget.block_size, num_blocks, blocks_per_cell)
            sums[call.layer] = sums.get(call.layer, 0) + counts.cpu()

    run_and_look(model, sequences, look, 1, autocast_dtype)
    pairs = len(sequences) * _visible_pairs(num_tokens, budget.block_size, blocks_per_cell)
    maps = tuple(_rounded(sums[layer] / pairs) for layer in sorted(sums))
    shape = (budget.block_size, budget.top_k, blocks_per_cell, num_tokens)
    return SelectionMap(tuple(sorted(sums)), *shape, maps)


def _budget_of(model) -> Budget:
    if not hf.is_converted(model):
        raise ValueError(f"model is a dense {type(model).__name__}; convert it first")
    budget = hf.room_of(model).budget
    if budget is None:
        raise ValueError(
            f"{hf.mechanism_of(model)} reads by position alone as it is configured here, so there "
            "is no selection to map"
        )
    return budget


def will_it_bear(
    model,
    sequences: Tensor | Sequence[Tensor],
    config: openmsa.MSAConfig,
    *,
    threshold: float = 0.8,
    max_queries: int | None = 256,
    batch_size: int = 1,
    autocast_dtype: torch.dtype | None = None,
) -> Bearing:
    """Judge a *dense* model before converting it; the model is not touched.

    A copy that shares every weight gets an index derived from its own projections and runs dense.
    `max_queries` per sequence are looked at. Raises ValueError for a model that is converted
    already, a threshold outside (0, 1], sequences that fit the budget, and whatever `convert`
    refuses.
    """
    if hf.is_converted(model):
        raise ValueError("model is converted already; ask evaluate_recall about it")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    trial = hf.convert(_copy_sharing_weights(model), config, init="main")
    hf.set_phase(trial, "dense")
    recall = evaluate_recall(
        trial,
        sequences,
        max_queries=max_queries,
        batch_size=batch_size,
        autocast_dtype=autocast_dtype,
    )
    layers = tuple(_judge(layer, threshold) for layer in recall.layers)
    queries = recall.layers[0].queries
    return Bearing(layers, config.block_size, config.top_k, threshold, queries)


def _judge(layer: LayerRecall, threshold: float) -> LayerBearing:
    means = {name: layer.mean(name) for name in MEASURES}
    ready, train, keep_dense = VERDICTS
    verdict = ready if means["captured_mass"] >= threshold else train
    verdict = keep_dense if means["oracle_mass"] < threshold else verdict
    return LayerBearing(layer=layer.layer, **means, verdict=verdict)


def _copy_sharing_weights(model):
    """A copy whose modules are new and whose parameters and buffers are the model's own."""
    shared = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def _counts(blocks: Tensor, block_size: int, num_blocks: int, blocks_per_cell: int) -> Tensor:
    """blocks int [g, t, k] of one sequence -> how often cell selects cell, fp64 [g, cells,
    cells].
    """
    g = blocks.shape[0]
    num_cells = -(-num_blocks // blocks_per_cell)
    counts = torch.zeros(g, num_cells, num_cells, dtype=torch.float64, device=blocks.device)
    rows_per_cell = block_size * blocks_per_cell
    for cell, rows in enumerate(blocks.split(rows_per_cell, dim=1)):
        chosen = as_mask(rows, num_blocks).sum(1).double()  # [g, n]
        chosen = torch.nn.functional.pad(chosen, (0, num_cells * blocks_per_cell - num_blocks))
        counts[:, cell] = chosen.unflatten(-1, (num_cells, blocks_per_cell)).sum(-1)
    return counts


def _visible_pairs(num_tokens: int, block_size: int, blocks_per_cell: int) -> Tensor:
    """Pairs (query token, visible block) per pair of cells, fp64 [cells, cells]."""
    own = torch.arange(num_tokens) // block_size
    num_cells = int(own[-1]) // blocks_per_cell + 1
    pairs = torch.zeros(num_cells, num_cells, dtype=torch.float64)
    for first in range(0, num_tokens, block_size):
        block, cell = first // block_size, first // block_size // blocks_per_cell
        queries = min(block_size, num_tokens - first)
        pairs[cell, :cell] += queries * blocks_per_cell
        pairs[cell, cell] += queries * (block - cell * blocks_per_cell + 1)
    return pairs


def _rounded(probability: Tensor) -> tuple:
    """Nested tuples of 4 digits; a cell with no visible pair (0 / 0) is None."""
    return tuple(
        tuple(tuple(None if v != v else round(v, 4) for v in row) for row in group)
        for group in probability.tolist()
    )
