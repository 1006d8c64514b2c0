"""The m3 suite: a MiniMax-M3 of one sparse layer, enabled, beside transformers' own attention.

Time and peak memory of a prompt, of a training step and of a decoded token, from 2K to 128K tokens
at 8/4 and 64/4 heads. Where transformers' masks do not fit the free memory, both are measured on
fewer KV groups, and ours alone on all of them; the row says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from openmsa.accounting import m3, m3_layer, machine
from openmsa.accounting.inputs import Shape
from openmsa.accounting.m3_layer import Found
from openmsa.cli.bench_plan import Row, Run, tokens_text
from openmsa.cli.console import say

HEADS = ((8, 4), (64, 4))
LONGEST, HIDDEN = 1 << 17, 512
WIDTH, CHUNK, MOST_GB = 6144, 1 << 13, 4.0  # the released model's width; a prompt in chunks
METRICS = {"forward": "prompt", "training": "forward and backward", "decode": "one token"}


def measured(run: Run) -> Iterator[Row]:
    """Rows of time and of memory; none where transformers has no MiniMax-M3."""
    if m3.missing():
        return
    for shape in _shapes(run):
        for part in m3_layer.PARTS:
            for tokens in _lengths(run):
                yield from _point(run, shape, part, tokens)
    yield _whole_width(run)


def _shapes(run: Run) -> list[Shape]:
    if not run.plan.with_targets:
        return [run.plan.shape]
    return [replace(run.plan.shape, h=h, g=g) for h, g in HEADS]


def _lengths(run: Run) -> list[int]:
    low, high = run.plan.context
    high = min(high, LONGEST if run.plan.with_targets else low)
    return [low << n for n in range(64) if low << n <= high]


def _point(run: Run, shape: Shape, part: str, tokens: int) -> Iterator[Row]:
    """All heads beside each of transformers' paths if they fit, else as many groups as do."""
    free = machine.available_bytes() or 8 << 30
    if (own := m3_layer.bytes_of_ours(part, shape, tokens)) > free:
        say(f"{_name(part, tokens, shape)} left out: it needs about {own / 1e9:.0f} GB")
        return
    groups = [n for n in range(1, shape.g + 1) if shape.g % n == 0]
    need = {n: m3_layer.bytes_of_theirs(part, m3_layer.on_groups(shape, n), tokens) for n in groups}
    fitting = max((n for n in groups if need[n] < free), default=0)
    if fitting < shape.g:
        note = f"transformers would need about {need[shape.g] / 1e9:.0f} GB"
        yield from _rows(
            run, shape, part, tokens, _measure(run, "openmsa", part, shape, tokens), note
        )
    if fitting == 0:
        return
    smaller = m3_layer.on_groups(shape, fitting)
    ours = _measure(run, "openmsa", part, smaller, tokens)
    note = f"both on {fitting} of {shape.g} groups" if fitting < shape.g else ""
    for side in ("sdpa", "eager"):
        try:
            theirs = _measure(run, side, part, smaller, tokens)
        except MemoryError as error:
            say(f"{_name(part, tokens, smaller)}: {error}")
            yield from _rows(run, smaller, part, tokens, ours, f"{note}; {error}".strip("; "))
            continue
        yield from _rows(run, smaller, part, tokens, ours, note, side, theirs)


def _measure(run: Run, side: str, part: str, shape: Shape, tokens: int) -> Found:
    hidden = HIDDEN if run.plan.with_targets else run.plan.hidden
    seconds = run.plan.seconds / 2
    return m3_layer.measure(side, part, shape, tokens, hidden=hidden, chunk=0, seconds=seconds)


def _rows(
    run: Run,
    shape: Shape,
    part: str,
    tokens: int,
    ours: Found,
    note: str,
    side: str = "",
    theirs: Found | None = None,
) -> Iterator[Row]:
    """Time and memory of one part, beside theirs if there is one."""
    name = _name(part, tokens, shape)
    words = shape.words(1 if part == "decode" else tokens, tokens, torch.bfloat16)
    verdict = None if theirs is None else m3_layer.same(ours, theirs)
    rival = "" if theirs is None else f"transformers, MiniMax-M3 with {side}"
    more = {"note": note, "context": tokens, "rival": rival, "verdict": verdict}
    times = tuple(1e3 * ours.times.quantile(share) for share in (0.2, 0.5, 0.8))
    peak = (ours.peak_bytes / 1e9,) * 3
    their_time = None if theirs is None else 1e3 * theirs.times.median
    their_peak = None if theirs is None else theirs.peak_bytes / 1e9
    repeats = len(ours.times.seconds)
    for end, metric, unit, mine, other, n in (
        ("", METRICS[part], "ms", times, their_time, repeats),
        (": memory", "peak above model and inputs", "GB", peak, their_peak, 1),
    ):
        ratio = None if other is None else other / max(1e-6, mine[1])
        more |= {"rival_value": other, "ratio": ratio, "repeats": n}
        yield Row(name + end, words, metric, unit, mine, **more)


def _name(part: str, tokens: int, shape: Shape) -> str:
    return f"M3 layer, {part}, {tokens_text(tokens)}, {shape.h}/{shape.g} heads"


def _whole_width(run: Run) -> Row:
    """The longest prompt through a layer as wide as the released model's, in chunks."""
    full = run.plan.with_targets
    shape, tokens = _shapes(run)[-1], _lengths(run)[-1]
    hidden, chunk = (WIDTH, CHUNK) if full else (run.plan.hidden, tokens // 2)
    found = m3_layer.measure(
        "openmsa", "forward", shape, tokens, hidden=hidden, chunk=chunk, seconds=0.0
    )
    taken = found.peak_bytes / 1e9
    goal = {"target": f"at most {MOST_GB:g}", "met": taken <= MOST_GB} if full else {}
    return Row(
        f"M3 layer, prompt of {tokens_text(tokens)} in chunks of {tokens_text(chunk)}: memory",
        f"{shape.words(tokens, tokens, torch.bfloat16)}, hidden {hidden}",
        "peak above model and inputs",
        "GB",
        (taken,) * 3,
        note=f"{found.times.median:.3g} s, cache included",
        repeats=1,
        context=tokens,
        **goal,
    )
