"""The plot of `openmsa cost`: cost against context, counted above and estimated below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from openmsa.accounting.cost import Estimate
from openmsa.cli.cost_report import Report, estimates
from openmsa.cli.cost_table import si, tokens_text

SHORTEST, LONGEST = 1 << 12, 1 << 20
Value = Callable[[Estimate], float | None]


def draw(report: Report, target: Path) -> tuple[Path, Path]:
    """Every mechanism from 4K tokens to the longest context asked for, at least 1M -> svg, png."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from openmsa.evaluation import canvas

    asked = max(e.context for e in report.estimates)
    lengths = [SHORTEST << i for i in range(24) if SHORTEST << i <= max(LONGEST, asked)]
    found = list(estimates(report.shape, report.chip, report.designs, lengths, report.given))
    with canvas.style():
        figure, axes = canvas.panels(2, 2, height_inches=6.2, sharex=True)
        for ax, (title, value, digits) in zip(axes, _panels(report), strict=True):
            ends = []
            for number, name in enumerate(report.designs):
                points = [(e.context, value(e)) for e in found if e.mechanism == name]
                colour = canvas.colour_of(number)
                marker = canvas.MARKERS[number % len(canvas.MARKERS)]
                ax.plot(*zip(*points), color=colour, marker=marker, markersize=3.5)
                ends.append((*points[-1], name, colour))
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_title(title)
            ax.xaxis.set_major_locator(LogLocator(base=4))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(round(x))))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            ax.yaxis.set_major_formatter(FuncFormatter(digits))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_locator(NullLocator())
            canvas.label_ends(ax, ends)
        for ax in axes[2:]:
            ax.set_xlabel("context (tokens)")
    return canvas.save(figure, target)


def _panels(report: Report) -> list[tuple[str, Value, Callable[[float, int], str]]]:
    def plain(x: float, _: int) -> str:
        return f"{x:g}"

    def prefixed(x: float, _: int) -> str:
        return si(x)

    counted = [
        ("FLOPs per prompt token and layer", lambda e: e.layer_prefill_flops_per_token, prefixed),
        ("Bytes per decode step and layer", lambda e: e.layer_decode_bytes, prefixed),
    ]
    chip = report.chip.title or report.chip.name
    if report.chip.dollars_per_hour is None:
        return [
            *counted,
            (f"Prompt, ms a token: {chip}", lambda e: 1e3 * e.prefill_seconds_per_token, plain),
            (f"Decoding, ms a token: {chip}", lambda e: 1e3 * e.decode_seconds_per_token, plain),
        ]
    return [
        *counted,
        (f"$ per M prompt tokens: {chip}", lambda e: e.dollars_per_million_prompt, plain),
        (f"$ per M generated: {chip}", lambda e: e.dollars_per_million_generated, plain),
    ]
