"""FLOPs, bytes and seconds of one attention layer under each mechanism, by count.

seconds of a kernel = max(FLOPs / (matrix rate · efficiency), bytes / (memory rate · efficiency))

Nothing here is measured, and the efficiencies are assumptions. Bytes of a prompt, per query token:

in a row   width · keys / TILE + q + out             TILE query tokens share what is read, out of
                                                     registers or a cache on the chip
gathered   the lesser of                             width: stored channels of a key and its value
             width · keys + q + out                  every query fetches its own, but for those on
                                                     the chip: as many of all as fit there
             width · s + blocks · (q + 2 out) + out  every block fetches its queries (paper, 3.2);
                                                     part of the output is written and read again
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from openmsa.accounting.chips import Chip
from openmsa.accounting.designs import MSA, Dense, Pass
from openmsa.accounting.shapes import Shape

TILE = 1024
PIECE = 1 << 20


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted. Efficiencies are those of the paper's own dense attention on an
    H800 (figure 4: 620 of 989 TFLOP/s, 2.58 of 3.35 TB/s).

    batch: sequences decoded together, each at the full context; a prompt is read alone. chips: None
    takes the fewest whose memory holds weights and caches. memory_share: of the memory, for those.
    on_chip_bytes: what the last cache holds (an H100's).
    """

    matrix_efficiency: float = 0.63
    memory_efficiency: float = 0.77
    weight_bytes: int = 2
    cache_bytes: int = 2
    batch: int = 8
    chips: int | None = None
    memory_share: float = 0.9
    on_chip_bytes: float = 50e6


@dataclass(frozen=True)
class Work:
    """One kernel, all its launches together."""

    name: str
    flops: int
    num_bytes: float
    element_bytes: int
    chooses: bool = False

    def times(self, count: int) -> Work:
        flops, num_bytes = count * self.flops, count * self.num_bytes
        return Work(self.name, flops, num_bytes, self.element_bytes, self.chooses)

    def seconds(self, chip: Chip, given: Assumptions) -> float:
        rate = given.matrix_efficiency * chip.matrix_rate(self.element_bytes)
        return max(self.flops / rate, self.num_bytes / (given.memory_efficiency * chip.memory_rate))


def prefill(design: Dense, shape: Shape, s: int, given: Assumptions) -> list[Work]:
    """One layer of attention over a prompt of s tokens. Dense attention unfolds a latent first."""
    shape = shape if design.is_dense(s) else shape.stored
    sums: dict[str, list] = {}
    for start in range(1, s + 1, PIECE):
        n = torch.arange(start, min(start + PIECE, s + 1))
        for part in design.passes(n, s, shape):
            read = part.keys if part.read is None else part.read
            counts = [0 if x is None else int(x.sum()) for x in (part.keys, part.blocks, read)]
            before = sums.get(part.name, [part, 0, 0, 0])[1:]
            sums[part.name] = [part, *(a + b for a, b in zip(before, counts))]
    return [_prefill_work(*counted, s, design, given) for counted in sums.values()]


def decode(design: Dense, shape: Shape, s: int, given: Assumptions) -> list[Work]:
    """One layer of attention for the last of s tokens of one sequence."""
    shape = shape.stored
    found = []
    for part in design.passes(torch.tensor([s]), s, shape):
        read = int((part.keys if part.read is None else part.read).sum())
        size = _element_bytes(part, design, given)
        rows = part.heads * (part.d + part.d_value)
        flops = _flops(part, int(part.keys.sum()))
        found.append(Work(part.name, flops, size * (part.width * read + rows), size, part.chooses))
    return found


def cache_bytes(design: Dense, shape: Shape, s: int, given: Assumptions) -> float:
    """Of one layer and one sequence of s tokens."""
    shape = shape.stored
    index = design.index_width(s, shape) * (design.index_bytes or given.cache_bytes)
    return design.kept_rows(s) * shape.kv_width * given.cache_bytes + index


def flops(works: Iterable[Work]) -> int:
    return sum(work.flops for work in works)


def num_bytes(works: Iterable[Work]) -> float:
    return sum(work.num_bytes for work in works)


def break_even(
    design: Dense, shape: Shape, given: Assumptions, *, of: str = "flops", limit: int = 1 << 20
) -> int | None:
    """The context from which on a layer of the mechanism is cheaper than a dense one.

    of: "flops" of a prompt, or "bytes" of a decoding step. None: not up to `limit` tokens.
    """

    def cheaper(s: int) -> bool:
        if of == "flops":
            works = (prefill(x, shape, s, given) for x in (design, Dense()))
            ours, dense = map(flops, works)
        else:
            works = (decode(x, shape, s, given) for x in (design, Dense()))
            ours, dense = map(num_bytes, works)
        return ours < dense

    high = limit
    if not cheaper(high):
        return None
    while high > 1 and cheaper(high // 2):
        high //= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cheaper(middle) else (middle, high)
    return high


def paper_flops(shape: Shape, s: int, design: MSA) -> tuple[int, int]:
    """Equation 12 for one layer, (dense, MSA): what is quadratic by half, the budget in full.

    F_GQA = 2 h d s²      F_MSA = g d_index s² + 4 h d s k block_size
    """
    main = shape.h * (shape.d + shape.d_value)
    index = shape.g * (design.d_index or shape.d_index)
    return main * s * s, index * s * s + 2 * main * s * design.budget_tokens


def paper_break_even(shape: Shape, design: MSA) -> float:
    """The context at which the two of equation 12 are equal; inf where MSA never is cheaper."""
    main = shape.h * (shape.d + shape.d_value)
    saved = main - shape.g * (design.d_index or shape.d_index)
    return 2 * main * design.budget_tokens / saved if saved > 0 else math.inf


def _flops(part: Pass, pairs: int) -> int:
    return 2 * (part.d + part.d_value) * part.heads * pairs


def _element_bytes(part: Pass, design: Dense, given: Assumptions) -> int:
    return (design.index_bytes if part.of_index else None) or given.cache_bytes


def _prefill_work(
    part: Pass, pairs: int, blocks: int, read: int, s: int, design: Dense, given: Assumptions
) -> Work:
    size = _element_bytes(part, design, given)
    q, out = part.heads * part.d, part.heads * part.d_value
    if part.blocks is None:
        moved = part.width * max(pairs / TILE, int(part.keys.max())) + s * (q + out)
    else:
        missed = max(0.0, 1 - given.on_chip_bytes / (size * part.width * s))
        by_query = part.width * max(s, missed * read) + s * (q + out)
        by_block = part.width * s + blocks * (q + 2 * out) + s * out
        moved = min(by_query, by_block)
    return Work(part.name, _flops(part, pairs), size * moved, size, part.chooses)
