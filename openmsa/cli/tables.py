"""What `evaluate` found, as tables, plain data and figures. The first model is the reference."""

from __future__ import annotations

from pathlib import Path

from openmsa.cli.console import table


def report(what: str, results: dict) -> list[dict]:
    """Print the table of one measure and return its rows, each with its model."""
    rows = [{"model": name, **row} for name, result in results.items() for row in result.rows()]
    {"perplexity": _perplexity, "retrieval": _retrieval, "recall": _recall}[what](results)
    return rows


def draw(found: dict[str, dict], folder: Path) -> None:
    """Write the figures of what was measured into `folder`, as svg and png."""
    from openmsa.evaluation import canvas, figures, maps
    from openmsa.evaluation.perplexity import compare

    if losses := found.get("perplexity"):
        first, *others = losses
        changes = {name: compare(losses[first], losses[name]) for name in others}
        drawn = figures.perplexity_by_position(losses, changes or None)
        canvas.save(drawn, folder / "perplexity")
    if answers := found.get("retrieval"):
        canvas.save(maps.needle_maps(answers), folder / "retrieval")


def _perplexity(results: dict) -> None:
    from openmsa.evaluation.perplexity import compare

    names = list(results)
    reference = results[names[0]]
    rows = []
    by_model = [results[name].rows() for name in names]
    for buckets in zip(*by_model):
        span = f"{buckets[0]['from_token']}-{buckets[0]['to_token']}"
        rows.append([span, *(bucket["perplexity"] for bucket in buckets)])
    rows.append(["all", *(results[name].mean_perplexity for name in names)])
    changes = [compare(reference, results[name]) for name in names[1:]]
    if changes:
        rows.append(["change", "-", *(_change(change) for change in changes)])
    table("Perplexity by position", ("tokens", *names), rows)


def _change(change) -> str:
    error = change.perplexity_change_stderr
    spread = "" if error is None else f" ± {error:.2%}"
    return f"{change.perplexity_change:+.2%}{spread}"


def _retrieval(results: dict) -> None:
    rows = []
    for cells in zip(*(result.rows() for result in results.values())):
        shown = [f"{cell['rate']:.0%} of {cell['total']}" for cell in cells]
        rows.append([cells[0]["task"].replace("_", " "), cells[0]["context_tokens"], *shown])
    table("Retrieval: right answers", ("task", "context", *results), rows)


def _recall(results: dict) -> None:
    from openmsa.evaluation.recall import MEASURES

    rows = [
        [name, row["layer"], *(row[measure] for measure in MEASURES)]
        for name, result in results.items()
        for row in result.rows()
    ]
    columns = ("model", "layer", *(measure.replace("_", " ") for measure in MEASURES))
    table("Recall of the index", columns, rows)
