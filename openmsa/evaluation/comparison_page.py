"""A comparison on one page: compare.html, compare.csv and compare.json, and the figures as files.

The page is whole in itself and opens without a network. What it says is made from the numbers.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from openmsa.evaluation import canvas, comparison_figures, page
from openmsa.evaluation.comparison import Comparison, Contender, rows
from openmsa.evaluation.figures import tokens_text
from openmsa.evaluation.headers import FACTS, facts_of, title_of
from openmsa.evaluation.plain import to_plain, write_json, write_whole
from openmsa.evaluation.sentences import change_text

ABSENT = "–"
CAPTIONS = {
    "quality": (
        "Quality against speed",
        "Lower and further left is better on the left, higher and further left on the right. Bars "
        "are one standard error of the paired change, and the 95% interval of a share.",
    ),
    "perplexity": (
        "Perplexity by position",
        "On held-out text; bars are one standard error over texts, paired on the right.",
    ),
    "retrieval": (
        "Retrieval",
        "Right answers, greedy and whole, by length of the context and depth of the asked line.",
    ),
    "decoding": (
        "Decoding time",
        "The whole model, one token at a time, over a cache filled to the length.",
    ),
    "times": (
        "Prefill and training time",
        "The whole model, batch 1. Mechanisms without kernels of their own run on torch where the "
        "others run on native code: speed here is that of this code, not of the ideas alone.",
    ),
    "selection": (
        "What is selected",
        "Share of the queries in a cell that read a key block, first group of each layer; a "
        "mechanism that chooses single tokens spreads over its cell.",
    ),
}


def write_comparison(comparison: Comparison, folder: str | os.PathLike, stamp: Mapping) -> Path:
    """Write `folder`/compare.html, .csv, .json and figures/*.svg, *.png; returns the page's path.

    stamp: columns that end every row of the csv (command, commit, device, date). Every file is
    whole or absent. Raises ValueError if the contenders were measured on different texts or
    questions.
    """
    folder = Path(folder)
    drawn = {name: make(comparison) for name, make in comparison_figures.FIGURES.items()}
    drawn = {name: figure for name, figure in drawn.items() if figure is not None}
    html = render(comparison, drawn)
    for name, figure in drawn.items():
        canvas.save(figure, folder / "figures" / name)
    write_whole(folder / "compare.csv", as_csv(comparison, stamp))
    write_json(folder / "compare.json", {"comparison": to_plain(comparison), **stamp})
    return write_whole(folder / "compare.html", html)


def as_csv(comparison: Comparison, stamp: Mapping) -> str:
    """The rows as csv text."""
    found = [{**row, **stamp} for row in rows(comparison)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _number(v) for k, v in row.items()} for row in found)
    return text.getvalue()


def _number(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def render(comparison: Comparison, drawn: Mapping[str, Figure]) -> str:
    """The page as HTML text."""
    names = ", ".join(c.mechanism for c in comparison.contenders)
    header = [
        page.paragraph(f"{names}: {comparison.start}", "soft"),
        page.paragraph(verdict(comparison), "verdict"),
    ]
    sections = [("summary", "Summary", [_summary(comparison)])]
    for name, figure in drawn.items():
        heading, caption = CAPTIONS[name]
        shown = page.picture(canvas.svg_text(figure), name, caption)
        sections.append((name, heading, [page.paragraph(caption), shown]))
    sections += [
        ("mechanisms", "The mechanisms", [_mechanisms(comparison)]),
        ("settings", "Settings", [_settings(comparison)]),
        ("reproduce", "How to reproduce", [page.preformatted("\n".join(comparison.commands))]),
    ]
    return page.page(comparison.title, header, sections)


def verdict(comparison: Comparison) -> str:
    """Who came closest to the first contender in perplexity, and who answered most questions."""
    first, *others = comparison.contenders
    if not others:
        return f"Only {first.mechanism} was measured."
    changes = comparison.changes()
    ranked = sorted(others, key=lambda c: changes[c.mechanism].mean_difference)
    told = ", ".join(f"{c.mechanism} {change_text(changes[c.mechanism])}" for c in ranked)
    sentences = [f"Perplexity against {first.mechanism}, best first: {told}."]
    if first.evidence.retrieval is not None:
        right = sorted(comparison.contenders, key=lambda c: -_answered(c)[0])
        told = ", ".join(f"{c.mechanism} {_answered(c)[0]}" for c in right)
        longest = max(first.evidence.retrieval.context_tokens)
        sentences.append(f"Right answers of {_answered(first)[1]} at {longest:,} tokens: {told}.")
    return " ".join(sentences)


def _answered(contender: Contender) -> tuple[int, int]:
    result = contender.evidence.retrieval
    counts = [result.counts(task, max(result.context_tokens)) for task in result.tasks]
    correct, total = (sum(column) for column in zip(*counts, strict=True))
    return correct, total


def _summary(comparison: Comparison) -> str:
    """One row per mechanism, one column per measure that anything has."""
    cells = [_measures(comparison, c) for c in comparison.contenders]
    columns = list(dict.fromkeys(name for cell in cells for name in cell))
    table = [
        (c.mechanism, *(cell.get(name, ABSENT) for name in columns))
        for c, cell in zip(comparison.contenders, cells, strict=True)
    ]
    caption = "± one standard error over texts, paired; times are medians, whole model, batch 1"
    return page.table(("", *columns), table, caption)


def _measures(comparison: Comparison, contender: Contender) -> dict[str, str]:
    first, evidence = comparison.contenders[0], contender.evidence
    cells = {"perplexity": f"{evidence.perplexity.mean_perplexity:.3f}"}
    if contender is not first:
        cells[f"against {first.mechanism}"] = change_text(comparison.changes()[contender.mechanism])
    if (asked := evidence.retrieval) is not None:
        for task in asked.tasks:
            correct, total = asked.counts(task, max(asked.context_tokens))
            at = tokens_text(max(asked.context_tokens))
            cells[f"{task.replace('_', ' ')} at {at}"] = f"{correct}/{total}"
    if evidence.recall is not None:
        cells["score recall"] = f"{evidence.recall.mean('score_recall'):.3f}"
    if evidence.decode:
        last = max(evidence.decode, key=lambda t: t.context_tokens)
        cells[f"ms/token at {tokens_text(last.context_tokens)}"] = f"{last.median_ms:.2f}"
    for kind in ("prefill", "training"):
        if contender.passes_of(kind):
            last = contender.passes_of(kind)[-1]
            at = tokens_text(last.num_tokens)
            cells[f"{kind} ms at {at}"] = f"{last.median_ms:,.0f}"
            if last.peak_bytes is not None:
                cells[f"{kind} MB at {at}"] = f"{last.peak_bytes / 1e6:,.0f}"
    cells["cache bytes/token"] = f"{contender.cache_bytes:,}"
    cells["added weights"] = f"{contender.added_parameters:,}"
    return cells


def _mechanisms(comparison: Comparison) -> str:
    """What the header of each mechanism's file says, and the numbers it ran with."""
    columns = ("", *(fact.lower() for fact in FACTS), "in this run")
    table = []
    for contender in comparison.contenders:
        facts = facts_of(contender.mechanism)
        name = f"{contender.mechanism}: {title_of(contender.mechanism)}"
        table.append((name, *(facts[fact] for fact in FACTS), contender.config))
    return page.table(columns, table, kind="words")


def _settings(comparison: Comparison) -> str:
    return page.table(("setting", "value"), comparison.settings.items(), kind="words")
