"""A whole model under each mechanism: seconds, shares, dollars and the chips that hold it.

seconds of a model = the sum over kernels (layer_cost) and the rest of the model, over the chips

Nothing here is measured. Splitting over chips is taken to be free, and kernels to run one after
another. The rest: projections, feed-forward and the map to the vocabulary; 2 FLOPs a weight and
token, and every weight that is met read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from openmsa.accounting.chips import Chip
from openmsa.accounting.designs import Dense
from openmsa.accounting.layer_cost import (
    Assumptions,
    Work,
    cache_bytes,
    decode,
    flops,
    num_bytes,
    prefill,
)
from openmsa.accounting.shapes import Shape


@dataclass(frozen=True)
class Estimate:
    """Of one mechanism at one context.

    layer_*: one layer that the mechanism replaces, one sequence. Others: the whole model; a prompt
    of `context` tokens read alone, or one step that gives each of `batch` sequences a token. Shares
    are those of attention. Dollars are per million tokens; None where the chip has no price.
    """

    mechanism: str
    context: int
    budget_tokens: int | None
    layer_prefill_flops_per_token: float
    layer_prefill_choosing_share: float
    layer_prefill_flops_against_dense: float
    layer_prefill_bytes: float
    layer_decode_flops: int
    layer_decode_bytes: float
    layer_decode_bytes_against_dense: float
    cache_bytes: float
    weight_bytes: float
    chips: int
    fits: bool
    prefill_seconds: float
    prefill_seconds_per_token: float
    prefill_attention_share: float
    prefill_attention_flops_share: float
    decode_seconds_per_step: float
    decode_seconds_per_token: float
    decode_attention_share: float
    dollars_per_million_prompt: float | None
    dollars_per_million_generated: float | None


def model_cache_bytes(design: Dense, shape: Shape, s: int, given: Assumptions) -> float:
    """Of all layers; those that stay dense are."""
    kept = shape.dense_attention_layers
    sparse = (shape.layers - kept) * cache_bytes(design, shape, s, given)
    return sparse + kept * cache_bytes(Dense(), shape, s, given)


def model_weight_bytes(design: Dense, shape: Shape, given: Assumptions) -> float:
    extra = (shape.layers - shape.dense_attention_layers) * design.extra_weights(shape.stored)
    return given.weight_bytes * (shape.total_weights + extra)


def chips_needed(
    designs: Iterable[Dense], shape: Shape, chip: Chip, s: int, given: Assumptions
) -> int:
    """The fewest whose memory holds weights and caches, whichever of the mechanisms is used."""
    most = max(_memory(design, shape, s, given) for design in designs)
    return max(1, math.ceil(most / (given.memory_share * chip.memory_bytes)))


def estimate(
    name: str, design: Dense, shape: Shape, chip: Chip, s: int, chips: int, given: Assumptions
) -> Estimate:
    """One mechanism's numbers at a context of s tokens."""
    layer, dense = ([f(x, shape, s, given) for f in (prefill, decode)] for x in (design, Dense()))
    prompt, token = (_all_layers(*both, shape) for both in zip(layer, dense))
    step = [work.times(given.batch) for work in token]
    rest = _rest(design, shape, s, 1, given), _rest(design, shape, given.batch, given.batch, given)
    attention, total = zip(*(_times(w, r, chip, given) for w, r in zip((prompt, step), rest)))
    seconds = [x / chips for x in total]
    dollars = [_dollars(x * chips / tokens, chip) for x, tokens in zip(seconds, (s, given.batch))]
    return Estimate(
        mechanism=name,
        context=s,
        budget_tokens=design.budget_tokens,
        **_of_layer(*layer, *dense, s),
        cache_bytes=model_cache_bytes(design, shape, s, given),
        weight_bytes=model_weight_bytes(design, shape, given),
        chips=chips,
        fits=chips >= chips_needed([design], shape, chip, s, given),
        prefill_seconds=seconds[0],
        prefill_seconds_per_token=seconds[0] / s,
        prefill_attention_share=attention[0] / total[0],
        prefill_attention_flops_share=flops(prompt) / (flops(prompt) + rest[0].flops),
        decode_seconds_per_step=seconds[1],
        decode_seconds_per_token=seconds[1] / given.batch,
        decode_attention_share=attention[1] / total[1],
        dollars_per_million_prompt=dollars[0],
        dollars_per_million_generated=dollars[1],
    )


def _of_layer(
    prompt: list[Work], step: list[Work], dense_prompt: list[Work], dense_step: list[Work], s: int
) -> dict[str, float]:
    """The layer_* fields of an Estimate."""
    total = flops(prompt)
    return {
        "layer_prefill_flops_per_token": total / s,
        "layer_prefill_choosing_share": flops(w for w in prompt if w.chooses) / total,
        "layer_prefill_flops_against_dense": flops(dense_prompt) / total,
        "layer_prefill_bytes": num_bytes(prompt),
        "layer_decode_flops": flops(step),
        "layer_decode_bytes": num_bytes(step),
        "layer_decode_bytes_against_dense": num_bytes(dense_step) / num_bytes(step),
    }


def _all_layers(layer: list[Work], dense: list[Work], shape: Shape) -> list[Work]:
    """Attention of the whole model; some layers stay dense."""
    kept = shape.dense_attention_layers
    sparse = [work.times(shape.layers - kept) for work in layer]
    return sparse + [work.times(kept) for work in dense]


def _dollars(chip_seconds: float, chip: Chip) -> float | None:
    """Of a million tokens that take so many seconds of a chip each."""
    price = chip.dollars_per_hour
    return None if price is None else 1e6 * chip_seconds * price / 3600


def _rest(design: Dense, shape: Shape, tokens: int, heads: int, given: Assumptions) -> Work:
    """Projections and feed-forward of all layers; `heads` tokens ask for the next one."""
    sparse = shape.layers - shape.dense_attention_layers
    attention = shape.layers * shape.attention_weights + sparse * design.extra_weights(shape.stored)
    asked = tokens * (attention + shape.ffn_weights(1)) + heads * shape.head_weights
    read = attention + shape.ffn_weights(tokens) + shape.head_weights
    return Work("rest", round(2 * asked), given.weight_bytes * read, given.weight_bytes)


def _times(works: list[Work], rest: Work, chip: Chip, given: Assumptions) -> tuple[float, float]:
    """Seconds of attention, and of everything."""
    attention = sum(work.seconds(chip, given) for work in works)
    return attention, attention + rest.seconds(chip, given)


def _memory(design: Dense, shape: Shape, s: int, given: Assumptions) -> float:
    caches = given.batch * model_cache_bytes(design, shape, s, given)
    return model_weight_bytes(design, shape, given) + caches
