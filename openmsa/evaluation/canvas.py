"""How every figure looks: size, colours that colour-blind readers can tell apart, direct labels.

Colours are those of Okabe and Ito (2008), and no figure tells two things apart by colour alone.
Figures are drawn without a display, and the same data gives the same bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2328", "#6a737d", "#d9dee3"
BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"
VERMILION, PURPLE, SKY = "#d55e00", "#cc79a7", "#56b4e9"
SERIES = (INK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
LAYERS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH_INCHES = 7.4

STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, searchable, in the reader's own font
    "svg.hashsalt": "openmsa",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the house; the caller's own matplotlib settings return afterwards."""
    with matplotlib.rc_context(STYLE):
        yield


def panels(rows: int, columns: int, *, height_inches: float, **options) -> tuple[Figure, list]:
    """A figure of report width and its axes, row by row. Nothing global is touched (no pyplot)."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def colour_of(number: int, palette: Sequence[str] = SERIES) -> str:
    """The colour of the series with this number; past the palette's end it starts again."""
    return palette[number % len(palette)]


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name at its last point. ends: (x, y, text, colour), in data units.

    Names that would overlap are moved apart vertically and stay in the order of their lines. Call
    it when everything else is drawn: places are those of the axes as they stand.
    """
    axes.figure.draw_without_rendering()
    points_per_pixel = 72 / axes.figure.dpi
    height = {end: axes.transData.transform(end[:2])[1] * points_per_pixel for end in ends}
    order = sorted(ends, key=height.get)
    ceiling = axes.bbox.y1 * points_per_pixel - 4
    moved = _spread([height[end] for end in order], 10.5, ceiling)
    for (x, y, text, colour), place in zip(order, moved, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(6, place - height[x, y, text, colour]),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


def _spread(heights: list[float], gap: float, ceiling: float) -> list[float]:
    """Ascending heights, moved apart until each is `gap` above the one before, none too high."""
    heights = list(heights)
    for _ in range(100):
        for low in range(len(heights) - 1):
            short = max(0.0, gap - (heights[low + 1] - heights[low]))
            heights[low] -= short / 2
            heights[low + 1] += short / 2
    excess = max(0.0, heights[-1] - ceiling) if heights else 0.0
    return [height - excess for height in heights]


def svg_text(figure: Figure) -> str:
    """The figure as SVG text, without the time it was made at."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "openmsa"})
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike, *, dots_per_inch: int = 160) -> tuple[Path, Path]:
    """Write `path`.svg and `path`.png (on white); returns both paths. Parents are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    svg.write_text(svg_text(figure), encoding="utf-8")
    with style():
        figure.savefig(png, dpi=dots_per_inch, facecolor="white", metadata={"Software": "openmsa"})
    return svg, png
