"""The plot of `openmsa bench gpu`: time against context, prefill and decoding, dense and MSA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openmsa.cli.bench_gpu_sweeps import DECODE, DENSE, MSA, PREFILL
from openmsa.cli.bench_plan import tokens_text

TITLES = {
    PREFILL: "Prefill, all of it (ms)",
    DECODE: "Decoding, one step of one sequence (ms)",
}


def draw(rows: Sequence[dict[str, str]], target: Path) -> tuple[Path, Path] | None:
    """rows of one run in gpu.csv -> svg and png; None where nothing was timed against context."""
    lines = {
        (metric, line): _points(rows, f"{metric}, {line}")
        for metric in TITLES
        for line in (DENSE, MSA)
    }
    if not any(lines.values()):
        return None
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from openmsa.evaluation import canvas

    with canvas.style():
        figure, axes = canvas.panels(1, 2, height_inches=3.4)
        for ax, (metric, title) in zip(axes, TITLES.items(), strict=True):
            ends = []
            for number, (line, colour) in enumerate(((DENSE, canvas.INK), (MSA, canvas.BLUE))):
                if points := lines[metric, line]:
                    ax.plot(*zip(*points), color=colour, marker=canvas.MARKERS[number])
                    ends.append((*points[-1], _named(line, metric, lines, rows), colour))
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(round(value))))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_locator(NullLocator())
            ax.set_title(title)
            ax.set_xlabel(f"context (tokens), {rows[0]['device'].partition(',')[0]}")
            canvas.label_ends(ax, ends)
    return canvas.save(figure, target)


def _points(rows: Sequence[dict[str, str]], what: str) -> list[tuple[int, float]]:
    return sorted(
        (int(row["context"]), float(row["p50"]))
        for row in rows
        if row["what"].startswith(f"{what}, ") and row["batch"] == "1" and row["p50"]
    )


def _named(line: str, metric: str, lines: dict, rows: Sequence[dict[str, str]]) -> str:
    """The name at a line's end; dense tells which kernel it is, and how many times MSA's time."""
    if line == MSA:
        return MSA
    at, value = lines[metric, DENSE][-1]
    ours = dict(lines[metric, MSA])
    times = f", {value / ours[at]:.3g}x MSA" if at in ours else ""
    kernels = {row["note"] for row in rows if row["what"].startswith(f"{metric}, {DENSE}, ")}
    name = next(iter(kernels)).removeprefix("torch SDPA ") if len(kernels) == 1 else "(fastest)"
    return f"dense {name}{times}"
