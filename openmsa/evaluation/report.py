"""The evidence on one page: report.html, report.json beside it, and the figures as files.

The page is whole in itself and opens without a network. What it says is made from the numbers; a
measurement that is missing is said to be missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from openmsa.evaluation import canvas, figures, maps, page, sentences
from openmsa.evaluation.criteria import criteria, pooled, verdict
from openmsa.evaluation.evidence import Evidence, ModelEvidence
from openmsa.evaluation.perplexity import compare
from openmsa.evaluation.plain import to_plain, write_json, write_whole
from openmsa.evaluation.recall import MEASURES
from openmsa.evaluation.retrieval import wilson

ANSWERS = {True: "✓ yes", False: "✗ no", None: "– not measured"}
ABSENT = "–"
CRITERION = ("rule", "measured", "holds")


def write_report(evidence: Evidence, folder: str | os.PathLike) -> Path:
    """Write `folder`/report.html, report.json and figures/*.svg, *.png; returns the page's path.

    Every file is whole or absent. Raises ValueError if the models were measured on different texts
    or questions.
    """
    folder = Path(folder)
    drawn = draw(evidence)
    html = render(evidence, drawn)
    for name, figure in drawn.items():
        canvas.save(figure, folder / "figures" / name)
    judged = criteria(evidence)
    told = {"verdict": verdict(judged), "criteria": judged, "summary": summary_rows(evidence)}
    write_json(folder / "report.json", {**told, "evidence": to_plain(evidence)})
    return write_whole(folder / "report.html", html)


def draw(evidence: Evidence) -> dict[str, Figure]:
    """Every figure the evidence has data for, by its name."""
    return {name: figure for name, make in FIGURES.items() if (figure := make(evidence))}


def render(evidence: Evidence, drawn: dict[str, Figure] | None = None) -> str:
    """The page as HTML text."""
    drawn = draw(evidence) if drawn is None else drawn
    judged = criteria(evidence)
    holds = [c.holds for c in judged]
    mood = "no" if False in holds else ("yes" if all(holds) else "")
    budget = (
        f"MiniMax Sparse Attention with {evidence.top_k} blocks of {evidence.block_size} tokens: "
        f"a query reads {evidence.budget_tokens:,} tokens at most."
    )
    header = [page.paragraph(budget, "soft")]
    header.append(page.paragraph(verdict(judged), f"verdict {mood}".strip()))
    rows = [(c.name, c.rule, c.measured, ANSWERS[c.holds]) for c in judged]
    sections = [
        ("criteria", "Criteria", [page.table(("", *CRITERION), rows, kind="words")]),
        ("summary", "Summary", [_summary(evidence)]),
        *_pictures(evidence, drawn),
        ("sample", "A sample", _sample(evidence)),
        ("settings", "Settings", _settings(evidence)),
        ("reproduce", "How to reproduce", _commands(evidence)),
    ]
    return page.page(evidence.title, header, sections)


def _pictures(evidence: Evidence, drawn: dict[str, Figure]) -> list[page.Section]:
    """A section per measurement: one sentence, its picture if there is one, its table if it has."""

    def section(name: str, heading: str, sentence: str, details: str = "") -> page.Section:
        parts = [page.paragraph(sentence)]
        if name in drawn:
            parts.append(page.picture(canvas.svg_text(drawn[name]), name, sentence))
        return name, heading, [*parts, details]

    return [
        section("perplexity", "Perplexity", sentences.perplexity(evidence)),
        section("retrieval", "Retrieval", sentences.retrieval(evidence), _answers(evidence)),
        section("recall", "Recall", sentences.recall(evidence), _recall(evidence)),
        section("training", "Training", sentences.training(evidence)),
        section("selection", "Selection", sentences.selection(evidence.selection)),
        section("decoding", "Decoding time", sentences.decoding(evidence)),
        section("bearing", "Before converting", sentences.bearing(evidence.bearing)),
    ]


def summary_rows(evidence: Evidence) -> list[dict]:
    """The summary table as plain data: {"measure", one key per model}, texts ready to print."""
    models = evidence.models
    rows = []

    def add(measure: str, cell: Callable[[ModelEvidence], str | None]) -> None:
        cells = {name: cell(model) for name, model in models.items()}
        if any(value is not None for value in cells.values()):
            rows.append({"measure": measure, **{n: v or ABSENT for n, v in cells.items()}})

    add("perplexity", _perplexity_cell)
    add("perplexity against dense", lambda model: _change_cell(evidence.dense, model))
    asked = next((m.retrieval for m in models.values() if m.retrieval is not None), None)
    for task in asked.tasks if asked else ():
        for tokens in asked.context_tokens:
            name = f"{task.replace('_', ' ')} at {tokens:,} tokens"
            add(name, lambda model, cell=(task, tokens): _retrieval_cell(model, *cell))
    for measure in MEASURES:
        name = measure.replace("_", " ")
        add(name, lambda m, which=measure: m.recall and f"{m.recall.mean(which):.3f}")
    contexts = sorted({time.context_tokens for m in models.values() for time in m.decode})
    for tokens in contexts:
        name = f"ms per token at {figures.tokens_text(tokens)} tokens"
        add(name, lambda model, at=tokens: _decode_cell(model, at))
    return rows


def _perplexity_cell(model: ModelEvidence) -> str | None:
    losses = model.perplexity
    if losses is None:
        return None
    error = losses.mean_loss_stderr
    spread = "" if error is None else f" ± {losses.mean_perplexity * error:.3f}"
    return f"{losses.mean_perplexity:.3f}{spread}"


def _change_cell(dense: ModelEvidence, model: ModelEvidence) -> str | None:
    if model is dense or dense.perplexity is None or model.perplexity is None:
        return None
    return sentences.change_text(compare(dense.perplexity, model.perplexity))


def _retrieval_cell(model: ModelEvidence, task: str, tokens: int) -> str | None:
    if model.retrieval is None:
        return None
    correct, total = model.retrieval.counts(task, tokens)
    return f"{correct / total:.1%} ({correct}/{total})"


def _decode_cell(model: ModelEvidence, tokens: int) -> str | None:
    times = [time.median_ms for time in model.decode if time.context_tokens == tokens]
    return f"{times[0]:.2f}" if times else None


def _summary(evidence: Evidence) -> str:
    rows = [list(row.values()) for row in summary_rows(evidence)]
    caption = "± one standard error over texts; in brackets: right answers / questions"
    return page.table(("", *evidence.models), rows, caption)


def _answers(evidence: Evidence) -> str:
    """Share of right answers at each length, all tasks and depths together, with its interval."""
    asked = {n: m.retrieval for n, m in evidence.models.items() if m.retrieval is not None}
    rows = []
    for tokens in next(iter(asked.values())).context_tokens if asked else ():
        counts = [pooled(r, [(task, tokens) for task in r.tasks]) for r in asked.values()]
        shares = [(c / n, *wilson(c, n)) for c, n in counts]
        rows.append((f"{tokens:,}", *(f"{r:.1%} ({a:.1%} to {b:.1%})" for r, a, b in shares)))
    caption = "All tasks and depths together, with the 95% interval (Wilson)"
    return page.table(("context (tokens)", *asked), rows, caption) if rows else ""


def _recall(evidence: Evidence) -> str:
    columns = ("model", "layer", *(m.replace("_", " ") for m in MEASURES), "queries")
    rows = [
        (name, row["layer"], *(f"{row[m]:.3f}" for m in MEASURES), f"{row['queries']:,}")
        for name, model in evidence.models.items()
        if model.recall is not None
        for row in model.recall.rows()
    ]
    caption = "Over queries that see more blocks than they may select; the own block counts."
    return page.table(columns, rows, caption) if rows else ""


def _sample(evidence: Evidence) -> list[str]:
    sample = evidence.sample
    if sample is None:
        return [page.paragraph(sentences.NOT_MEASURED)]
    told = f"The {sample.model} model read {sample.context_tokens:,} tokens that begin like this:"
    parts = [page.paragraph(told), page.preformatted(sample.opening)]
    parts += [page.paragraph("The text ended with:"), page.preformatted(sample.question)]
    parts += [page.paragraph("It wrote:"), page.preformatted(sample.written)]
    if sample.answer is not None:
        right = (
            "the right answer"
            if sample.written.strip() == sample.answer.strip()
            else (f"wrong; the right answer was {sample.answer.strip()!r}")
        )
        parts.append(page.paragraph(f"That is {right}."))
    return parts


def _settings(evidence: Evidence) -> list[str]:
    budget = f"{evidence.top_k} blocks of {evidence.block_size} = {evidence.budget_tokens:,} tokens"
    rows = [("budget", budget), *evidence.settings.items()]
    return [page.table(("setting", "value"), rows, kind="words")]


def _commands(evidence: Evidence) -> list[str]:
    if not evidence.commands:
        return [page.paragraph("No commands were recorded.")]
    return [
        page.paragraph("The same commands on the same machine give the same numbers, times aside:"),
        page.preformatted("\n".join(evidence.commands)),
    ]


def _perplexity_figure(evidence: Evidence) -> Figure | None:
    losses = {n: m.perplexity for n, m in evidence.models.items() if m.perplexity is not None}
    if "dense" not in losses:
        return None
    changes = {n: compare(losses["dense"], r) for n, r in losses.items() if n != "dense"}
    return figures.perplexity_by_position(losses, changes or None)


def _retrieval_figure(evidence: Evidence) -> Figure | None:
    asked = {n: m.retrieval for n, m in evidence.models.items() if m.retrieval is not None}
    return maps.needle_maps(asked) if asked else None


def _training_figure(evidence: Evidence) -> Figure | None:
    has_loss = any("lm_loss" in r or "loss" in r for r in evidence.training)
    return figures.training_curves(evidence.training) if has_loss else None


def _recall_figure(evidence: Evidence) -> Figure | None:
    has_recall = any(key.startswith("score_recall/") for r in evidence.training for key in r)
    return figures.recall_curves(evidence.training) if has_recall else None


def _decoding_figure(evidence: Evidence) -> Figure | None:
    shown = {n: m.decode for n, m in evidence.models.items() if m.decode and m != evidence.control}
    times = {n: [(t.context_tokens, t.median_ms) for t in ts] for n, ts in shown.items()}
    return figures.decode_times(times) if times else None


FIGURES: dict[str, Callable[[Evidence], Figure | None]] = {
    "perplexity": _perplexity_figure,
    "retrieval": _retrieval_figure,
    "recall": _recall_figure,
    "training": _training_figure,
    "selection": lambda e: maps.selection_maps(e.selection) if e.selection else None,
    "decoding": _decoding_figure,
    "bearing": lambda e: figures.mass_by_layer(e.bearing) if e.bearing else None,
}
