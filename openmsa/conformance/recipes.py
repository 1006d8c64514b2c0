"""The cases by name: the trap, what an engine does that falls into it, and where inputs come from.

Only make.py builds them; a judge reads what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from openmsa.conformance import traps
from openmsa.conformance.case import Inputs, Rule, Step
from openmsa.conformance.traps import inputs


@dataclass(frozen=True)
class Recipe:
    """build: the inputs, or the steps of a cache case. ties: equal scores are meant. with_loss:
    the index loss has a value."""

    name: str
    trap: str
    wrong: str
    build: Callable[[], Inputs | tuple[Step, ...]]
    ties: bool = False
    with_loss: bool = True


RECIPES = (
    Recipe(
        "plain",
        "a batch of two without any trap: scores, maxima, softmax, loss",
        "pools a block's scores by their mean, leaves the student's scores unscaled, or "
        "returns the log-sum-exp to base 2",
        lambda: inputs(1, b=2),
    ),
    Recipe(
        "groups",
        "every group of heads chooses its own blocks",
        "takes the best score over all groups and shares one selection",
        lambda: inputs(2, h=6, g=3),
    ),
    Recipe(
        "token_mask",
        "a selected block may hold keys that the query must not see",
        "masks whole blocks only and reads the future inside the query's own block",
        lambda: inputs(3, Rule(block_size=8), s=48),
    ),
    Recipe(
        "score_mask",
        "a block is worth its best visible key; nothing is forced (local_blocks = 0)",
        "lets keys of the future raise the score of the query's own block",
        lambda: inputs(4, Rule(local_blocks=0)),
    ),
    Recipe(
        "ties",
        "equal scores: the lower block number wins",
        "leaves ties to its sorting, and prefers later blocks",
        traps.ties,
        ties=True,
    ),
    Recipe(
        "zeros",
        "queries and index all zero: every score ties, attention is uniform, the loss is 0",
        "divides 0 by 0, or chooses other blocks than its own and the first ones",
        traps.zeros,
        ties=True,
    ),
    Recipe(
        "signed_zeros",
        "-0 equals +0",
        "orders scores by their bits and puts -0 below +0",
        traps.signed_zeros,
        ties=True,
    ),
    Recipe(
        "nan_scores",
        "NaN scores are the lowest, also in the first block of a row",
        "sorts NaN above all numbers, or lets it reach the whole row",
        traps.not_numbers,
        with_loss=False,
    ),
    Recipe(
        "few_blocks",
        "fewer visible blocks than top_k: all are selected, as in dense attention",
        "reads the empty slots (-1) as a block, or counts one twice",
        lambda: inputs(9, Rule(top_k=16), s=22),
    ),
    Recipe(
        "left_padding",
        "blocks are counted from the first real token of a row",
        "counts blocks from the padded slot, or attends to padding",
        lambda: traps.padded(10, left=True),
    ),
    Recipe(
        "right_padding",
        "padding behind a row changes nothing",
        "lets padded rows into the loss, or padded keys into the softmax",
        lambda: traps.padded(11, left=False),
    ),
    Recipe(
        "packing",
        "sequences lie one after another; blocks start anew in each",
        "counts blocks across sequences, or reads the sequence before",
        lambda: traps.packed(12, [13, 19, 17], [13, 19, 17]),
    ),
    Recipe(
        "empty_sequence",
        "packed sequences without queries, without keys, and with fewer queries than keys",
        "loses the place of the sequences behind an empty one",
        lambda: traps.packed(13, [0, 9, 0, 6], [0, 22, 7, 17]),
    ),
    Recipe(
        "offset",
        "the queries are the last of the keys, from the middle of a block on",
        "puts the first query at position 0, or rounds its position to a block",
        lambda: inputs(14, s=43, t=10),
    ),
    Recipe(
        "short_tail",
        "the last block is short; scores are negative for one group (local_blocks = 0)",
        "fills the last block with zeros, which win, or drops it",
        traps.short_tail,
    ),
    Recipe(
        "local_competes",
        "the query's own block is kept although its score is the lowest, and uses a slot",
        "lets the own block compete by score, or keeps it beside top_k others",
        lambda: traps.slope(inputs(16), 1.5, -1.5),
    ),
    Recipe(
        "local_blocks",
        "the two latest blocks are kept (local_blocks = 2)",
        "keeps the query's own block only",
        lambda: traps.slope(inputs(17, Rule(local_blocks=2)), 1.5, -1.5),
    ),
    Recipe(
        "sink_blocks",
        "the first block is kept (sink_blocks = 1) although its score is the lowest",
        "lets the first block compete by score, or keeps it beside top_k others",
        lambda: traps.slope(inputs(18, Rule(sink_blocks=1)), -1.5, 1.5),
    ),
    Recipe(
        "no_selection",
        "a query with no block at all: output 0, log-sum-exp -inf, gradient 0",
        "returns NaN, or the mean of all values",
        traps.no_selection,
        with_loss=False,
    ),
    Recipe(
        "row_weights",
        "the loss is averaged over weights, not over rows",
        "divides by all rows, also those that weigh nothing",
        traps.weighted,
    ),
    Recipe(
        "head_order",
        "each head is renormalised on the selected keys first, heads are averaged second",
        "averages the heads of dense attention and renormalises their sum",
        traps.sharp_heads,
    ),
    Recipe(
        "warmup",
        "while the index warms up, attention is dense and the loss covers the whole prefix",
        "restricts the loss to the selected blocks",
        lambda: inputs(22, Rule(phase="warmup")),
    ),
    Recipe(
        "large_logits",
        "scaled scores of several hundred",
        "overflows in exp because it does not subtract the maximum first",
        traps.large_logits,
    ),
    Recipe(
        "scales",
        "scale and index_scale are given",
        "uses 1 / sqrt(d) all the same",
        lambda: inputs(24, Rule(scale=0.5, index_scale=0.125)),
    ),
    Recipe(
        "odd_shape",
        "three heads a group, d 12, values of 20 channels, an index of 8, blocks of 5",
        "knows one shape only, and reads past it",
        lambda: inputs(25, Rule(block_size=5), s=38, h=6, d=12, dv=20, di=8),
    ),
    Recipe(
        "wide",
        "the shape that kernels are built for: 16 heads a group, d 128, blocks of 128",
        "is right in small shapes only",
        lambda: inputs(26, Rule(block_size=128, top_k=4), t=3, s=517, h=16, g=1, d=128, di=128),
    ),
    Recipe(
        "cache_decode",
        "token by token, across the border of a block",
        "forgets index keys, or moves to the next block too early or too late",
        traps.decode,
    ),
    Recipe(
        "cache_chunks",
        "a prompt in chunks that end in the middle of a block",
        "starts every chunk at a border of blocks",
        traps.chunks,
    ),
    Recipe(
        "cache_crop",
        "tokens are taken back, into the middle of a block, and others follow",
        "crops keys and values but not the index keys",
        traps.cropped,
    ),
    Recipe(
        "cache_reorder",
        "rows change places and are doubled, as in beam search",
        "reorders keys and values but not the index keys",
        traps.reordered,
    ),
    Recipe(
        "cache_reload",
        "the cache is written and read again",
        "writes keys and values but not the index keys",
        traps.reloaded,
    ),
    Recipe(
        "cache_padding",
        "token by token behind a batch that was padded on the left",
        "counts blocks from the padded slot, or loses the padding after the prompt",
        traps.padded_decode,
    ),
    Recipe(
        "cache_prefix",
        "a prefix that ends in the middle of a block is reused by two continuations",
        "keeps a block's score from the tokens that were there before",
        traps.forked,
    ),
)
NAMES = tuple(recipe.name for recipe in RECIPES)
