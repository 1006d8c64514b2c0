"""The plot of `openmsa bench cpu`: time against context, dense and MSA, prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openmsa.cli.bench_sweep import DECODE, DENSE, MSA, PREFILL, SDPA

TITLES = {PREFILL: "Prefill: one more query token (ms)", DECODE: "Decoding: one step (ms)"}
LINES = (SDPA, DENSE, MSA)


def draw(rows: Sequence[dict[str, str]], target: Path) -> tuple[Path, Path]:
    """rows of cpu_sweep.csv, of which the latest run is drawn -> svg and png."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from openmsa.evaluation import canvas
    from openmsa.evaluation.figures import tokens_text

    latest = max(row["run"] for row in rows)
    rows = [row for row in rows if row["run"] == latest]
    with canvas.style():
        figure, axes = canvas.panels(1, 2, height_inches=3.4)
        for ax, (metric, title) in zip(axes, TITLES.items(), strict=True):
            ends = []
            for number, line in enumerate(LINES):
                points = _points(rows, line, metric)
                if not points:
                    continue
                colour = canvas.colour_of(number, (canvas.INK, canvas.VERMILION, canvas.BLUE))
                ax.plot(*zip(*points), color=colour, marker=canvas.MARKERS[number])
                ends.append((*points[-1], _named(line, points, rows, metric), colour))
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(value)))
            ax.yaxis.set_major_locator(LogLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_locator(NullLocator())
            ax.set_title(title)
            ax.set_xlabel("context (tokens)")
            canvas.label_ends(ax, ends)
    return canvas.save(figure, target)


def _points(rows: Sequence[dict[str, str]], line: str, metric: str) -> list[tuple[int, float]]:
    here = [row for row in rows if (row["what"], row["metric"]) == (line, metric)]
    return sorted((int(row["context"]), float(row["p50"])) for row in here)


def _named(line: str, points, rows: Sequence[dict[str, str]], metric: str) -> str:
    """The name at a line's end; dense lines tell how many times as long as MSA they take."""
    if line == MSA:
        return line
    line = line.removeprefix("dense (").removesuffix(")") if line == SDPA else "dense"
    ours = dict(_points(rows, MSA, metric))
    at, value = points[-1]
    times = value / ours[at] if at in ours else 0
    factor = f", {times:.{0 if times >= 10 else 1}f}x MSA" if times else ""
    return line + factor
