"""Heat maps: retrieval over length and depth, and what the index selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from openmsa.evaluation import canvas
from openmsa.evaluation.figures import tokens_text
from openmsa.evaluation.inspection import SelectionMap
from openmsa.evaluation.retrieval import RetrievalResult

SEQUENTIAL = "cividis"  # made for colour-blind readers, and readable without colour
WIDE = 4  # models beside each other with room for words under each
MAPS_PER_ROW = 4  # as many as are large enough to read at report width


def needle_maps(results: Mapping[str, RetrievalResult]) -> Figure:
    """Share of right answers by depth and length: one row per task, one column per model.

    results: {model: result}, all of one plan. All maps share one colour scale, 0 to 100 %. Raises
    ValueError if the plans differ.
    """
    first = next(iter(results.values()))
    shape = (first.tasks, first.context_tokens, first.depths, first.total, first.seed)
    for name, r in results.items():
        if (r.tasks, r.context_tokens, r.depths, r.total, r.seed) != shape:
            raise ValueError(f"results[{name!r}] is of another plan; evaluate all with one plan")
    with canvas.style():
        height = 0.9 + len(first.tasks) * (0.25 + 0.2 * max(4, len(first.depths)))
        figure, axes = canvas.panels(
            len(first.tasks), len(results), height_inches=height, sharex=True, sharey=True
        )
        for place, ax in enumerate(axes):
            task = first.tasks[place // len(results)]
            name = list(results)[place % len(results)]
            image = _needle_map(ax, results[name], task, 7.5 if len(results) <= WIDE else 5.5)
            if place < len(results):
                ax.set_title(name)
            if place % len(results) == 0:
                ax.set_ylabel(f"{task.replace('_', ' ')}\ndepth")
        last = axes[-len(results) :]
        for ax in last if len(results) <= WIDE else [last[len(last) // 2]]:
            ax.set_xlabel("context (tokens)")
        bar = figure.colorbar(image, ax=axes, fraction=0.025, aspect=40)
        bar.set_label(f"right answers of {first.total} per cell")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.outline.set_visible(False)
    return figure


def selection_maps(maps: SelectionMap) -> Figure:
    """Probability that a query block selects a key block: one map per layer and group.

    Key blocks run to the right, query blocks downwards; the future stays empty. The colour scale is
    stretched at its low end (square root), so that rare selections can be seen beside sure ones.
    """
    with canvas.style():
        groups = len(maps.probability[0])
        columns = groups * max(1, MAPS_PER_ROW // groups)
        rows = -(-len(maps.layers) * groups // columns)
        side = (canvas.WIDTH_INCHES - 1.3) / max(columns, 3)
        figure, axes = canvas.panels(
            rows, columns, height_inches=0.6 + rows * (side + 0.25), sharex=True, sharey=True
        )
        figure.set_layout_engine("compressed", w_pad=0.05, h_pad=0.07)
        for ax in axes[len(maps.layers) * groups :]:
            ax.set_axis_off()
        for place, ax in enumerate(axes[: len(maps.layers) * groups]):
            image = _selection_map(ax, maps, *divmod(place, groups))
        for ax in axes[::columns]:
            ax.set_ylabel("query at token")
        for ax in axes[-columns:]:
            ax.set_xlabel("key at token")
        _selection_bar(figure, image, axes)
    return figure


def selections_side_by_side(
    chosen: Mapping[str, SelectionMap], layers: Sequence[int] | None = None
) -> Figure:
    """One row per layer, one column per mechanism, the first group of each; layers: None for the
    first, the middle and the last. The scale of `selection_maps`.
    """
    first = next(iter(chosen.values())).layers
    layers = sorted({first[0], first[len(first) // 2], first[-1]}) if layers is None else layers
    with canvas.style():
        side = (canvas.WIDTH_INCHES - 1.3) / max(len(chosen), 3)
        figure, axes = canvas.panels(
            len(layers),
            len(chosen),
            height_inches=0.7 + len(layers) * (side + 0.2),
            sharex=True,
            sharey=True,
        )
        figure.set_layout_engine("compressed", w_pad=0.05, h_pad=0.07)
        for place, ax in enumerate(axes):
            layer, (name, found) = (
                layers[place // len(chosen)],
                list(chosen.items())[place % len(chosen)],
            )
            image = _selection_map(ax, found, found.layers.index(layer), 0)
            ax.set_title(name if place < len(chosen) else "")
            if place % len(chosen) == 0:
                ax.set_ylabel(f"layer {layer}\nquery at token")
        for ax in axes[-len(chosen) :]:
            ax.set_xlabel("key at token")
        _selection_bar(figure, image, axes)
    return figure


def _selection_bar(figure: Figure, image, axes: list[Axes]) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.025, aspect=40)
    bar.set_label("share of queries")
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)


def _selection_map(ax: Axes, maps: SelectionMap, layer: int, group: int):
    image = ax.imshow(
        np.array(maps.probability[layer][group], dtype=float),
        cmap=SEQUENTIAL,
        norm=PowerNorm(0.5, 0, 1),
        interpolation="none",
        extent=(0, maps.num_tokens, maps.num_tokens, 0),
    )
    ax.grid(False)
    ax.set_title(f"layer {maps.layers[layer]}, group {group}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3, steps=[1, 2, 4, 5, 10]))
    return image


def _needle_map(ax: Axes, result: RetrievalResult, task: str, size: float):
    values = np.array(result.correct[task]).T / result.total  # [depth, length]
    image = ax.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    ax.grid(False)
    ticks = {"fontsize": size + 1}
    ax.set_xticks(
        range(len(result.context_tokens)), map(tokens_text, result.context_tokens), **ticks
    )
    ax.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for (depth, length), value in np.ndenumerate(values):
        colour = "#000000" if value > 0.55 else "#ffffff"
        ax.text(
            length, depth, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=size
        )
    return image
