"""Curves: training, recall, perplexity by position, decoding time, mass per layer.

Every function takes plain data and returns a matplotlib figure; `canvas.save` writes it as SVG and
PNG. Heat maps are in `maps`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from openmsa.evaluation import canvas
from openmsa.evaluation.inspection import Bearing
from openmsa.evaluation.perplexity import PairedDifference, PositionLoss

RECALL_TITLES = {
    "block_recall": "Block recall (% of oracle)",
    "score_recall": "Score recall (% of oracle)",
    "captured_mass": "Captured mass (% of all)",
}


def training_curves(log: Sequence[Mapping]) -> Figure:
    """Loss of the language model and KL of the index per layer against the tokens seen.

    log: what `openmsa.training.history` returns: records with "tokens" (ascending), "phase",
    "lm_loss" ("loss" in a phase without an index) in nats per token and "kl/layer_0" ... in nats;
    a record need not have all of them. Raises ValueError if no record holds a loss.
    """
    log = [{**r, "lm_loss": r.get("lm_loss", r.get("loss"))} for r in log]
    loss, layers = _series(log, "lm_loss"), _layer_keys(log, "kl/")
    if not loss:
        raise ValueError(f"log has no record with 'lm_loss' or 'loss'; it has {sorted(_keys(log))}")
    with canvas.style():
        figure, axes = canvas.panels(1, 2 if layers else 1, height_inches=2.9)
        _smoothed_line(axes[0], loss)
        axes[0].set_title("Language model loss (nats per token)")
        for ax in axes:
            _mark_phases(ax, log)
        if layers:
            log_scale(axes[1])
            axes[1].set_title("KL of index from attention (nats)")
            canvas.label_ends(axes[1], _layer_lines(axes[1], log, layers))
    return figure


def recall_curves(
    log: Sequence[Mapping], *, measures: Sequence[str] = tuple(RECALL_TITLES)
) -> Figure:
    """Block recall, score recall and captured mass per layer against the tokens seen.

    log: what `openmsa.training.history` returns: records with "tokens", "phase" and, where
    `recall.probe` ran, keys like "score_recall/layer_0" (0 to 1).
    Raises ValueError if no record holds a measure.
    """
    shown = [m for m in measures if _layer_keys(log, f"{m}/")]
    if not shown:
        raise ValueError(f"log has none of {', '.join(measures)}; it has {sorted(_keys(log))}")
    with canvas.style():
        figure, axes = canvas.panels(1, len(shown), height_inches=2.8, sharey=True)
        ends = []
        for ax, name in zip(axes, shown, strict=True):
            ends.append(_layer_lines(ax, log, _layer_keys(log, f"{name}/")))
            ax.set_title(RECALL_TITLES.get(name, name))
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            _mark_phases(ax, log)
        axes[0].set_ylabel("mean over queries and groups")
        axes[0].set_ylim(*_room_below_one(log, shown))
        for ax, line_ends in zip(axes, ends, strict=True):
            canvas.label_ends(ax, line_ends)
    return figure


def perplexity_by_position(
    results: Mapping[str, PositionLoss], changes: Mapping[str, PairedDifference] | None = None
) -> Figure:
    """Perplexity against the position in the context and, if given, its change against a reference.

    results: {model: losses}, all with the same edges. changes: {model: difference to the reference}
    on the same tokens. Bars are one standard error over sequences.
    """
    with canvas.style():
        figure, axes = canvas.panels(1, 2 if changes else 1, height_inches=3.1)
        for number, (name, result) in enumerate(results.items()):
            means = [None if e is None else p * e for p, e in _pairs(result)]
            _error_line(axes[0], result.edges, result.perplexity, means, name, number)
        axes[0].set_title("Perplexity (lower is better)")
        axes[0].legend(frameon=False, fontsize=8.5)
        if changes:
            names = list(results)
            for name, change in changes.items():
                percent = [None if d is None else 100 * math.expm1(d) for d in change.difference]
                errors = [
                    None if d is None or e is None else 100 * math.exp(d) * e
                    for d, e in zip(change.difference, change.stderr, strict=True)
                ]
                number = names.index(name) if name in names else len(names)
                _error_line(axes[1], change.edges, percent, errors, name, number)
            axes[1].axhline(0, color=canvas.INK, linewidth=1)
            axes[1].axhspan(-1, 1, color=canvas.GRID, alpha=0.5, linewidth=0)
            axes[1].set_title(f"Perplexity against {names[0]} (%; band: ±1%)")
            _change_scale(axes[1])
        for ax in axes:
            ax.set_xlabel("position in the context (tokens before)")
            log2_ticks(ax)
    return figure


def decode_times(times: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Milliseconds per generated token against the context, both logarithmic.

    times: {model: [(context in tokens, ms per token) ...]}. With two models measured at one longest
    context, the factor between them there is written into the title.
    """
    with canvas.style():
        figure, (ax,) = canvas.panels(1, 1, height_inches=3.2)
        ends = []
        for number, (name, points) in enumerate(times.items()):
            points = sorted(points)
            colour, marker = canvas.colour_of(number), canvas.MARKERS[number % len(canvas.MARKERS)]
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker)
            ends.append((*points[-1], name, colour))
        log_scale(ax)
        log2_ticks(ax)
        ax.set_title("Time per generated token (ms)" + _factor(times))
        ax.set_xlabel("context (tokens)")
        canvas.label_ends(ax, ends)
    return figure


def mass_by_layer(bearing: Bearing) -> Figure:
    """Per layer of a dense model: mass of the best blocks, mass of the derived index, the
    threshold.
    """
    with canvas.style():
        height = 1.3 + 0.26 * len(bearing.layers)
        figure, (ax,) = canvas.panels(1, 1, height_inches=height)
        for row, layer in enumerate(bearing.layers):
            ends = [layer.captured_mass, layer.oracle_mass]
            ax.plot(ends, [row, row], color=canvas.SOFT, linewidth=1.2, zorder=1)
            ax.plot(ends[:1], [row], "s", color=canvas.BLUE, label="derived index, untrained")
            ax.plot(ends[1:], [row], "o", color=canvas.INK, label="best possible blocks")
            ax.annotate(
                layer.verdict,
                (1.01, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8.5,
                color=canvas.VERMILION if layer.verdict == "keep dense" else canvas.INK,
            )
        ax.axvline(bearing.threshold, color=canvas.VERMILION, linestyle="--", linewidth=1)
        ax.set_yticks(range(len(bearing.layers)), [f"layer {b.layer}" for b in bearing.layers])
        ax.set_ylim(len(bearing.layers) - 0.5, -0.5)
        ax.set_xlim(right=1.0)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        budget = f"{bearing.top_k} blocks of {bearing.block_size} tokens"
        ax.set_title(f"Attention mass inside {budget}; dashed: threshold")
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles[:2], labels[:2], frameon=False, ncols=2, loc="outside lower left")
    return figure


def _series(log: Sequence[Mapping], key: str) -> list[tuple[int, float]]:
    return [(r["tokens"], r[key]) for r in log if r.get(key) is not None]


def _keys(log: Sequence[Mapping]) -> set[str]:
    return {key for record in log for key in record}


def _layer_keys(log: Sequence[Mapping], prefix: str) -> dict[str, str]:
    """{key of the log: name of the layer} in the order of the layers."""
    keys = [key for key in _keys(log) if key.startswith(prefix)]
    names = {key: key[len(prefix) :].replace("_", " ") for key in keys}
    return {key: names[key] for key in sorted(keys, key=lambda k: (len(names[k]), names[k]))}


def _layer_lines(ax: Axes, log: Sequence[Mapping], layers: Mapping[str, str]) -> list[tuple]:
    """Draw a line per layer; returns their ends for `canvas.label_ends`."""
    ends = []
    for number, (key, name) in enumerate(layers.items()):
        points, colour = _series(log, key), canvas.colour_of(number, canvas.LAYERS)
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.4)
        ends.append((*points[-1], name, colour))
    return ends


def _mark_phases(ax: Axes, log: Sequence[Mapping]) -> None:
    """Tokens as the axis, and a line with a name where each phase begins."""
    ax.set_xlabel("tokens seen in training")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    before = None
    for record in log:
        phase = record.get("phase")
        if phase is None or phase == before:
            continue
        if before is not None:
            ax.axvline(record["tokens"], color=canvas.SOFT, linestyle=":", linewidth=1)
        ax.annotate(
            phase,
            (record["tokens"], 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            va="top",
            color=canvas.SOFT,
            fontsize=8,
        )
        before = phase


def _pairs(result: PositionLoss):
    return zip(result.perplexity, result.loss_stderr, strict=True)


def _error_line(ax: Axes, edges, values, errors, name: str, number: int) -> None:
    """Values at the (geometric) middle of their buckets, with bars of one standard error."""
    kept = [b for b, value in enumerate(values) if value is not None]
    middles = [(edges[b] * (edges[b + 1] - 1)) ** 0.5 for b in kept]
    bars = [errors[b] or 0.0 for b in kept]
    ax.errorbar(
        middles,
        [values[b] for b in kept],
        yerr=bars,
        color=canvas.colour_of(number),
        marker=canvas.MARKERS[number % len(canvas.MARKERS)],
        label=name,
        elinewidth=1,
        capsize=2,
    )


def _smoothed_line(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    """The values as logged, thin, and their running mean over a tenth of them, bold."""
    x, y = (list(column) for column in zip(*points, strict=True))
    half = len(y) // 20
    windows = [y[max(0, n - half) : n + half + 1] for n in range(len(y))]
    if half:
        ax.plot(x, y, color=canvas.SOFT, linewidth=0.7, alpha=0.6)
    ax.plot(x, [sum(window) / len(window) for window in windows], color=canvas.INK)


def _room_below_one(log: Sequence[Mapping], measures: Sequence[str]) -> tuple[float, float]:
    """Limits of an axis that ends at 1 and begins a little below the lowest value shown."""
    keys = [key for name in measures for key in _layer_keys(log, f"{name}/")]
    return max(0.0, min(v for key in keys for _, v in _series(log, key)) - 0.05), 1.0


def log_scale(ax: Axes, which: str = "y") -> None:
    """A logarithmic axis ("x" or "y") with plain numbers at 1, 2 and 5."""
    axis = {"x": ax.xaxis, "y": ax.yaxis}[which]
    ax.set(**{f"{which}scale": "log"})
    axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _change_scale(ax: Axes) -> None:
    """Even up to ±2, logarithmic beyond, if there is much beyond: small changes stay visible."""
    low, high = ax.get_ylim()
    if max(-low, high) <= 5:
        return
    ax.set_yscale("symlog", linthresh=2, linscale=1)
    ticks = [-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    bottom = max((tick for tick in ticks if tick <= low), default=low)
    top = min((tick for tick in ticks if tick >= high), default=high)
    ax.set_ylim(bottom, top)
    ax.set_yticks([tick for tick in ticks if bottom <= tick <= top])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.set_ylabel("logarithmic beyond ±2%")


def log2_ticks(ax: Axes) -> None:
    """Powers of two on the x axis, written as people write lengths."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: tokens_text(v)))


def tokens_text(count: float) -> str:
    """A number of tokens as people write it: 512, 2K, 128K, 1M (powers of two)."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count / unit:g}{name}"
    return f"{count:,.0f}"


def _factor(times: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """How much longer the first of two models takes at their longest context, if it is one."""
    if len(times) != 2:
        return ""
    (first, slow), (second, fast) = ((n, max(p)) for n, p in times.items())
    if slow[0] != fast[0]:
        return ""
    at, factor = tokens_text(slow[0]), slow[1] / fast[1]
    return f"; at {at} tokens, {first} takes {factor:.1f} times as long as {second}"
