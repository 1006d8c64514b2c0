"""The tables of `openmsa cost`: one layer counted, the whole model estimated, break-evens told."""

from __future__ import annotations

from collections.abc import Mapping

from openmsa.accounting.chips import SHIPPED, Chip
from openmsa.accounting.cost import Estimate
from openmsa.accounting.designs import DESIGNS, make
from openmsa.accounting.shapes import Shape
from openmsa.cli.console import table
from openmsa.cli.cost_report import Report

COUNTED = ("mechanism", "reads", "FLOP", "saves", "choosing", "bytes", "saves", "cache")
ESTIMATED = ("mechanism", "prompt", "share", "step", "share", "$/M in", "$/M out")
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
DURATIONS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def show(report: Report) -> None:
    """Print two tables for each context and what they rest on."""
    chip = report.chip
    for s in sorted({e.context for e in report.estimates}):
        here = [e for e in report.estimates if e.context == s]
        about = f"{tokens_text(s)} tokens, {report.shape.title or report.shape.name}"
        table(f"{about}: counted", COUNTED, map(_counted, here))
        held = "" if all(e.fits for e in here) else "; ! does not fit"
        title = f"{about}: estimated on {here[0].chips} x {chip.title or chip.name}{held}"
        table(title, ESTIMATED, map(_estimated, here))
    for line in (*_break_evens(report), *_rests_on(report)):
        print(line)


def list_all(chips: Mapping[str, Chip], shapes: Mapping[str, Shape]) -> None:
    """Print what can be asked for, with its sources."""
    rows = [
        [
            name,
            f"{si(c.bf16_flops)}FLOP/s",
            f"{si(c.fp8_flops)}FLOP/s" if c.fp8_flops else "-",
            f"{si(c.memory_rate)}B/s",
            f"{si(c.memory_bytes)}B",
            c.dollars_per_hour or "-",
        ]
        for name, c in chips.items()
    ]
    table("Chips", ("--chip", "bf16", "fp8", "memory", "size", "$/hour"), rows)
    rows = [
        [name, f"{s.total_weights / 1e9:.1f} B", s.layers, f"{s.h}/{s.g}", s.d]
        for name, s in shapes.items()
    ]
    table("Shapes", ("--model", "weights", "layers", "heads/KV", "head dim"), rows)
    rows = [[name, _numbers(name)] for name in DESIGNS]
    table("Mechanisms", ("--mechanism", "numbers (--set)"), rows)
    named = {**chips, **shapes, **DESIGNS}
    print("Sources:")
    for name, thing in named.items():
        print(f"  {name}: {thing.source}")
    print(f"Prices move: copy {SHIPPED}, edit it and give it with --chip-file.")


def tokens_text(tokens: int) -> str:
    """128K, 1M; what is no round number stays as it is."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def si(value: float) -> str:
    """Three digits and a decimal prefix: 17.2 G"""
    value = float(f"{value:.3g}")
    size, name = next((p for p in PREFIXES if value >= p[0]), PREFIXES[-1])
    return f"{value / size:.3g} {name}"


def duration(seconds: float) -> str:
    """Three digits and a unit of time: 4.84 s"""
    seconds = float(f"{seconds:.3g}")
    size, name = next((d for d in DURATIONS if seconds >= d[0]), DURATIONS[-1])
    return f"{seconds / size:.3g} {name}"


def _counted(found: Estimate) -> list[str]:
    budget = found.budget_tokens
    return [
        found.mechanism,
        "all" if budget is None else f"{budget:,}",
        f"{si(found.layer_prefill_flops_per_token)}",
        f"{found.layer_prefill_flops_against_dense:.3g}x",
        f"{found.layer_prefill_choosing_share:.0%}",
        f"{si(found.layer_decode_bytes)}B",
        f"{found.layer_decode_bytes_against_dense:.3g}x",
        f"{si(found.cache_bytes)}B",
    ]


def _estimated(found: Estimate) -> list[str]:
    dollars = (found.dollars_per_million_prompt, found.dollars_per_million_generated)
    return [
        found.mechanism + ("" if found.fits else " !"),
        duration(found.prefill_seconds),
        f"{found.prefill_attention_share:.0%}",
        duration(found.decode_seconds_per_step),
        f"{found.decode_attention_share:.0%}",
        *("-" if x is None else f"{x:.3g}" for x in dollars),
    ]


def _break_evens(report: Report) -> list[str]:
    told = []
    for what, found in (
        ("FLOPs of a prompt", report.break_even_flops),
        ("bytes of a decode step", report.break_even_bytes),
    ):
        if found:
            each = (
                f"{k} {'nowhere up to 1M' if v is None else f'{v:,}'}" for k, v in found.items()
            )
            told.append(f"Fewer {what} than dense from (tokens): {', '.join(each)}.")
    if told_by_paper := report.equation_12:
        ratios = (f"{x:.1f}x at {tokens_text(s)}" for s, x in told_by_paper.against_dense.items())
        told.append(
            "MSA as its paper counts (equation 12: the budget in full for every token): "
            f"{', '.join(ratios)}; break-even at {told_by_paper.break_even_tokens:,.0f} tokens."
        )
    return told


def _rests_on(report: Report) -> list[str]:
    given = report.given
    kept = report.shape.dense_attention_layers
    told = [
        "Counted, for one attention layer and one sequence: tokens that a query reads at most; "
        "FLOP per token of a prompt, the factor below dense and what choosing takes of it; bytes "
        "that a decode step reads and the factor below dense; cache of the whole model.",
        "Estimated, not measured, for the whole model: seconds of a prompt and of a decode step of "
        f"{given.batch} sequences, attention's share of them, dollars per million tokens read and "
        f"written. Assumed: {given.matrix_efficiency:.0%} of the chip's matrix rate and "
        f"{given.memory_efficiency:.0%} of its memory rate, splitting over chips for free, "
        f"{given.weight_bytes} bytes a weight and {given.cache_bytes} a channel of the cache, "
        f"chosen keys fetched anew for each query but for {si(given.on_chip_bytes)}B kept on a "
        "chip.",
        "Mechanisms stand at their published numbers, which read different amounts; compare costs "
        "at one budget with --set.",
    ]
    if kept:
        told.append(f"{kept} of {report.shape.layers} layers stay dense under every mechanism.")
    if report.chip.dollars_per_hour is None:
        told.append(f"No price is known for {report.chip.name}: give one with --chip-file.")
    return told


def _numbers(name: str) -> str:
    design = make(name)
    return ", ".join(f"{key}={value}" for key, value in vars(design).items()) or "none"
