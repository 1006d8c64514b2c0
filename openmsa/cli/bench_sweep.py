"""Time against context, dense and MSA: prefill per query token, a whole prefill, a decode step.

Prefill is timed on the last chunk of queries before the context's end, which is what one more
token costs there. Dense attention is measured on a part of its heads and query tokens where all of
them would take minutes, and scaled: its work is the same for each. A whole prefill is timed where
it takes seconds and otherwise extrapolated, by adding up what the tokens of each stretch cost; a
sweep that starts beyond one chunk has nothing to add to and leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from openmsa.accounting import inputs, machine, rivals, work
from openmsa.accounting.inputs import Inputs
from openmsa.accounting.timing import Times, timed
from openmsa.cli.bench_plan import Row, Run, tokens_text

BF16 = torch.bfloat16
MSA, DENSE, SDPA = "MSA", "dense (OpenMSA)", "dense (torch SDPA)"
EXTRAPOLATED = "extrapolated"
PREFILL, WHOLE, DECODE = "prefill, a query token", "whole prefill", "decode, one step"


@dataclass(frozen=True)
class Point:
    """Times of one line at one context; seconds of a query token, a prefill or a step."""

    line: str
    metric: str
    context: int
    times: Times
    note: str = ""

    def row(self, run: Run) -> Row:
        """As a row: the context is the first number of its shape."""
        shape = run.plan.shape.words(self.context, self.context, BF16)
        values = tuple(1e3 * self.times.quantile(share) for share in (0.2, 0.5, 0.8))
        more = {"note": self.note, "repeats": len(self.times.seconds), "context": self.context}
        return Row(self.line, shape, self.metric, "ms", values, data="agreeing", **more)


def contexts(run: Run) -> list[int]:
    """Doubling from the lower limit to the upper, as far as memory goes."""
    (low, high), shape = run.plan.context, run.plan.shape
    free = machine.available_bytes()
    found = [low]
    while found[-1] * 2 <= min(high, run.plan.most_tokens):
        found.append(2 * found[-1])
    a_token = 2 * (2 * shape.g * shape.d + shape.d_index)
    return [s for s in found if free is None or 1.5 * s * a_token + (1 << 30) < free]


def sweep(run: Run) -> Iterator[Point]:
    """Every point of the plot, short contexts first."""
    lengths = contexts(run)
    if not lengths:
        return
    t = min(run.plan.chunk, lengths[-1])
    longest = run.inputs(t, lengths[-1], BF16, "agreeing")
    whole: dict[str, Point] = {}
    before: dict[str, Point] = {}
    for s in lengths:
        x = longest.last(min(t, s), s)
        for point in _prefill(run, x):
            yield point
            if s <= run.plan.chunk or point.line in whole:
                all_of_it = _whole(run, point, before.get(point.line), whole.get(point.line))
                whole[point.line], before[point.line] = all_of_it, point
                yield all_of_it
        yield from _decode(run, longest.last(1, s))


def crossing(run: Run) -> Iterator[Row]:
    """The shortest context from which select + attend with the index's own projections is as fast
    as SDPA; the projections that both need are left out, they move no crossing.
    """
    plan, shape = run.plan, run.plan.shape
    weight = inputs.normal(plan.hidden, (shape.g + 1) * shape.d_index, dtype=BF16, seed=8)
    found, shortest = [], None
    for s in plan.crossing:
        x = run.inputs(s, s, BF16)
        hidden = inputs.normal(1, s, plan.hidden, dtype=BF16, seed=6)
        ours = timed(
            lambda x=x, hidden=hidden: (hidden @ weight, run.msa(x)), seconds=plan.seconds / 4
        )
        rival = rivals.prefill(x, seconds=plan.seconds / 4, flops=plan.slice_flops)
        ratio = rival.times.median / ours.median
        found.append(f"{tokens_text(s)}: {ratio:.2f}x")
        if ratio < 1:
            shortest = None
        elif shortest is None:
            shortest = s
    value = float("nan") if shortest is None else float(shortest)
    goal = {"target": "<= 2048", "met": shortest is not None and shortest <= 2048}
    yield Row(
        "MSA layer as fast as SDPA from",
        shape.words(plan.crossing[-1], plan.crossing[-1], BF16),
        "context",
        "tokens",
        (value,) * 3,
        rival="torch SDPA",
        note="; ".join(found),
        **(goal if plan.with_targets else {}),
    )


def _prefill(run: Run, x: Inputs) -> Iterator[Point]:
    """The last chunk, per query token."""
    plan, t, s = run.plan, x.q.shape[1], x.k.shape[1]
    times = timed(lambda: run.msa(x), seconds=plan.seconds / 2).scaled(1 / t)
    yield Point(MSA, PREFILL, s, times)
    part, factor, note = _part(run, x)
    times = timed(lambda: run.dense(part), seconds=plan.seconds / 2)
    yield Point(DENSE, PREFILL, s, times.scaled(factor / part.q.shape[1]), note)
    part, _, _ = _part(run, x, groups=False)
    flops = plan.slice_flops / 2
    rival = rivals.prefill(part, seconds=plan.seconds / 4, flops=flops)
    note = rival.words if part is x else f"{rival.words}, {part.q.shape[1]} query tokens"
    yield Point(SDPA, PREFILL, s, rival.times.scaled(1 / part.q.shape[1]), note)


def _part(run: Run, x: Inputs, groups: bool = True) -> tuple[Inputs, float, str]:
    """(as much of x as stays within the plan's FLOPs, how much more the whole is, in words)

    Fewer groups first (if asked), then fewer query tokens, the last ones.
    """
    shape, t, s = run.plan.shape, x.q.shape[1], x.k.shape[1]
    one = work.attend_flops(work.causal_pairs(t, s), shape.r, shape.d, shape.d)
    if one * shape.g <= 2 * run.plan.slice_flops:
        return x, 1.0, ""
    if groups:
        x = Inputs(x.q[:, :, : shape.r], x.k[:, :, :1], x.v[:, :, :1], x.q_index, x.k_index)
    least = min(t, 64)
    tokens = max(least, min(t, int(t * 2 * run.plan.slice_flops / one) // least * least))
    x = x.last(tokens, s)
    words = f"measured on {tokens} query tokens" + (f", 1 of {shape.g} groups" if groups else "")
    return x, float(shape.g if groups else 1), f"{words}, scaled"


def _whole(run: Run, point: Point, before: Point | None, shorter: Point | None) -> Point:
    """A whole prefill: timed, or half the context's and what the other half's tokens cost."""
    s, per_token = point.context, point.times.median
    if before is None or shorter is None or s <= run.plan.chunk:
        return Point(point.line, WHOLE, s, point.times.scaled(s), point.note)
    middle = (before.times.median + per_token) / 2
    total = Times((shorter.times.median + middle * (s - before.context),))
    if point.line != SDPA and total.median <= run.plan.whole_seconds:
        x = run.inputs(s, s, BF16, "agreeing")
        call = run.msa if point.line == MSA else run.dense
        return Point(point.line, WHOLE, s, timed(lambda: call(x), seconds=run.plan.seconds / 2))
    return Point(point.line, WHOLE, s, total, EXTRAPOLATED)


def _decode(run: Run, x: Inputs) -> Iterator[Point]:
    seconds, s = run.plan.seconds / 8, x.k.shape[1]
    yield Point(MSA, DECODE, s, timed(lambda: run.msa(x), seconds=seconds, most=200))
    yield Point(DENSE, DECODE, s, timed(lambda: run.dense(x), seconds=seconds, most=200))
    rival = rivals.decode(x, seconds=seconds)
    yield Point(SDPA, DECODE, s, rival.times, rival.words)


def crossovers(points: Sequence[Point]) -> list[str]:
    """From which context on MSA is faster, in words: prefill and decoding, against each dense."""
    told = []
    for metric in (PREFILL, WHOLE, DECODE):
        for rival in (SDPA, DENSE):
            ours, theirs = (_line(points, line, metric) for line in (MSA, rival))
            told.append(f"{metric}: {_crossing(ours, theirs, rival)}")
    return told


def _line(points: Sequence[Point], line: str, metric: str) -> dict[int, float]:
    here = [p for p in points if (p.line, p.metric) == (line, metric)]
    return {p.context: p.times.median for p in here}


def _crossing(ours: dict[int, float], theirs: dict[int, float], rival: str) -> str:
    """Where ours comes below for good, on the straight line between two points of the log plot."""
    lengths = sorted(ours)
    if not lengths:
        return "not measured"
    ratio = {s: theirs[s] / ours[s] for s in lengths}
    last = lengths[-1]
    at_last = f"{ratio[last]:.3g} times as fast at {tokens_text(last)}"
    behind = [s for s in lengths if ratio[s] < 1]
    if not behind:
        return (
            f"MSA is faster than {rival} from {tokens_text(lengths[0])} (the shortest), {at_last}"
        )
    if behind[-1] == last:
        return f"MSA is not faster than {rival} up to {tokens_text(last)}, {at_last}"
    low = behind[-1]
    high = lengths[lengths.index(low) + 1]
    # log ratio is taken as linear in log context; it is 0 at the crossing.
    a, b = torch.tensor([ratio[low], ratio[high]]).log().tolist()
    crossing = round(low * (high / low) ** (-a / (b - a)))
    return f"MSA is faster than {rival} from about {crossing:,} tokens, {at_last}"
