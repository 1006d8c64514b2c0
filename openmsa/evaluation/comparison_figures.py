"""Pictures of a comparison: quality against speed, time against length, maps side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from openmsa.evaluation import canvas, figures, maps
from openmsa.evaluation.comparison import Comparison, Contender
from openmsa.evaluation.retrieval import RetrievalResult, wilson

CELL_INCHES = 1.18


def quality_against_speed(comparison: Comparison) -> Figure | None:
    """Change of perplexity, and right answers at the longest context, against decoding time."""
    shown = [c for c in comparison.contenders if c.evidence.decode]
    if not shown:
        return None
    asked = all(c.evidence.retrieval is not None for c in shown)
    changes = comparison.changes()
    with canvas.style():
        figure, axes = canvas.panels(1, 1 + asked, height_inches=3.3)
        ends: list[list] = [[] for _ in axes]
        for number, contender in enumerate(comparison.contenders):
            if contender not in shown:
                continue
            change = changes.get(contender.mechanism)
            value = 100 * change.perplexity_change if change else 0.0
            error = 100 * (change.perplexity_change_stderr or 0) if change else 0.0
            ends[0].append(_point(axes[0], contender, number, value, (error, error)))
            if asked:
                right = _right(contender.evidence.retrieval)
                ends[1].append(_point(axes[1], contender, number, *right))
        at = figures.tokens_text(max(t.context_tokens for t in shown[0].evidence.decode))
        for ax in axes:
            ax.set_xlabel(f"ms per generated token at {at} tokens")
            figures.log_scale(ax, "x")
            ax.margins(x=0.22, y=0.15)
            ax.xaxis.set_major_locator(LogLocator(subs=_steps(*ax.get_xlim())))
        axes[0].set_title(f"Perplexity against {comparison.contenders[0].mechanism} (%)")
        if asked:
            longest = max(shown[0].evidence.retrieval.context_tokens)
            axes[1].set_title(f"Right answers at {longest:,} tokens")
            axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for ax, names in zip(axes, ends, strict=True):
            canvas.label_ends(ax, names)
    return figure


def _steps(low: float, high: float) -> tuple[float, ...]:
    """Ticks within a decade: more on an axis that is shorter than one."""
    decades = math.log10(high / low)
    if decades < 1:
        return (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    return (1, 2, 5) if decades < 3 else (1,)


def _right(result: RetrievalResult) -> tuple[float, tuple[float, float]]:
    """Share of right answers at the longest context, all tasks, and its 95 % interval around it."""
    counts = [result.counts(task, max(result.context_tokens)) for task in result.tasks]
    correct, total = (sum(column) for column in zip(*counts, strict=True))
    low, high = wilson(correct, total)
    share = correct / total
    return share, (max(0.0, share - low), max(0.0, high - share))


def _point(ax: Axes, contender: Contender, number: int, value: float, error) -> tuple:
    """Draw it with its bars; what `canvas.label_ends` has to write comes back."""
    time = max(contender.evidence.decode, key=lambda t: t.context_tokens).median_ms
    colour, marker = canvas.colour_of(number), canvas.MARKERS[number % len(canvas.MARKERS)]
    bars = [[error[0]], [error[1]]]
    ax.errorbar([time], [value], yerr=bars, color=colour, marker=marker, elinewidth=1, capsize=2)
    return time, value, contender.mechanism, colour


def times(comparison: Comparison) -> Figure | None:
    """Prefill and training time against length, both logarithmic."""
    kinds = {
        "prefill": "Prefill (ms for all tokens)",
        "training": "Training step (ms, forward and backward)",
    }
    kinds = {k: title for k, title in kinds.items() if comparison.contenders[0].passes_of(k)}
    if not kinds:
        return None
    with canvas.style():
        figure, axes = canvas.panels(1, len(kinds), height_inches=3.3)
        for ax, (kind, title) in zip(axes, kinds.items(), strict=True):
            ends = []
            for number, contender in enumerate(comparison.contenders):
                points = [(p.num_tokens, p.median_ms) for p in contender.passes_of(kind)]
                colour = canvas.colour_of(number)
                marker = canvas.MARKERS[number % len(canvas.MARKERS)]
                ax.plot(*zip(*points, strict=True), color=colour, marker=marker)
                ends.append((*points[-1], contender.mechanism, colour))
            figures.log_scale(ax)
            figures.log2_ticks(ax)
            ax.set_title(title)
            ax.set_xlabel("tokens")
            canvas.label_ends(ax, ends)
    return figure


def needles(comparison: Comparison) -> Figure | None:
    """Share of right answers by depth and length, one column per mechanism."""
    asked = {n: e.retrieval for n, e in comparison.evidence.items() if e.retrieval is not None}
    return maps.needle_maps(asked) if asked else None


def selections(comparison: Comparison, layers: Sequence[int] | None = None) -> Figure | None:
    """What each mechanism selects: one row per layer, one column per mechanism, its first group."""
    chosen = {c.mechanism: c.selection for c in comparison.contenders if c.selection is not None}
    return maps.selections_side_by_side(chosen, layers) if chosen else None


FIGURES: Mapping = {
    "quality": quality_against_speed,
    "perplexity": lambda c: figures.perplexity_by_position(
        {n: e.perplexity for n, e in c.evidence.items()}, c.changes() or None
    ),
    "retrieval": needles,
    "decoding": lambda c: (
        figures.decode_times(
            {
                n: [(t.context_tokens, t.median_ms) for t in e.decode]
                for n, e in c.evidence.items()
                if e.decode
            }
        )
        if any(e.decode for e in c.evidence.values())
        else None
    ),
    "times": times,
    "selection": selections,
}
