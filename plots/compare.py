"""The tables of docs/compare.md, from the rows that `openmsa compare` writes.

    openmsa compare --start both --out runs/compare
    python plots/compare.py runs/compare/dense/compare.csv runs/compare/scratch/compare.csv

With files, their rows become benchmarks/results/compare.csv first; without, the rows that are
there are shown again. The page's text is written by hand, its numbers are not.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks" / "results" / "compare.csv"
PAGE = ROOT / "docs" / "compare.md"
BEGIN, END = "<!-- tables of plots/compare.py -->", "<!-- end of tables -->"
ABSENT = "–"
TASKS = ("passkey", "multi_key", "key_value")
STARTS = {
    "dense": "Converted from the dense model",
    "scratch": "From random weights",
}
Rows = Sequence[dict]


def read(path: Path) -> list[dict]:
    """Rows of a csv; values as numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tables(rows: Rows) -> str:
    """Everything between the markers, as markdown."""
    parts = []
    for start, heading in STARTS.items():
        if mine := [row for row in rows if row["start"] == start]:
            parts += [f"### {heading}", origin(mine), ranking(mine), quality(mine), by_length(mine)]
            parts += [timing(mine, "decode", "ms per generated token"), passes(mine), sizes(mine)]
    return "\n\n".join(part for part in parts if part)


def origin(rows: Rows) -> str:
    """What these rows are of, in a sentence."""
    row = rows[0]
    return (
        f"`{row['command']}`, {row['date']}, commit `{row['commit']}`, {row['device']}. "
        f"Tokens that each was trained on: {whole(value(rows, 'dense', 'training tokens'))}."
    )


def ranking(rows: Rows) -> str:
    """Who came closest to dense, in a sentence."""
    changes = {m: find(rows, m, "perplexity change") for m in mechanisms(rows)}
    ranked = sorted((float(r["value"]), m) for m, r in changes.items() if r is not None)
    if not ranked:
        return ""
    told = ", ".join(f"{name} {change:+.2f} %" for change, name in ranked)
    return f"Perplexity against dense, best first: {told}."


def quality(rows: Rows) -> str:
    """Perplexity, and its change with one standard error; recall where there is an index."""
    lines = []
    for name in mechanisms(rows):
        change = find(rows, name, "perplexity change")
        told = ABSENT
        if change is not None:
            error = (float(change["high"]) - float(change["low"])) / 2
            told = f"{float(change['value']):+.2f} ± {error:.2f} %"
        recall = value(rows, name, "score recall")
        lines.append(
            (
                name,
                f"{value(rows, name, 'perplexity'):.3f}",
                told,
                ABSENT if recall is None else f"{recall:.3f}",
            )
        )
    return markdown(("", "perplexity", "against dense", "score recall"), lines)


def by_length(rows: Rows) -> str:
    """Share of right answers, task by task and length by length."""
    columns = [(task, n) for task in TASKS for n in contexts(rows, task)]
    heads = [f"{task.replace('_', ' ')} at {whole(n)}" for task, n in columns]

    def cell(row: dict) -> str:
        return f"{100 * float(row['value']):.0f} %"

    return grid(rows, columns, heads, cell)


def timing(rows: Rows, metric: str, what: str) -> str:
    """Milliseconds by length."""
    columns = [(metric, n) for n in contexts(rows, metric)]
    heads = [f"{what} at {whole(n)}" if i == 0 else whole(n) for i, (_, n) in enumerate(columns)]
    return grid(rows, columns, heads, lambda row: f"{float(row['value']):,.4g}")


def passes(rows: Rows) -> str:
    """Prefill and training step by length: milliseconds, and memory beside the model's own."""
    columns, heads = [], []
    for kind in ("prefill", "training"):
        for metric, unit in ((kind, "ms"), (f"{kind} memory", "MB")):
            for n in contexts(rows, metric):
                columns.append((metric, n))
                heads.append(f"{kind} {unit} at {whole(n)}")

    def cell(row: dict) -> str:
        number = float(row["value"])
        return whole(number / 1e6 if row["unit"] == "bytes" else number)

    return grid(rows, columns, heads, cell)


def sizes(rows: Rows) -> str:
    """Cache and weights."""
    columns = [("cache", None), ("added parameters", None)]
    heads = ["cache, bytes per token", "added weights"]
    return grid(rows, columns, heads, lambda row: whole(float(row["value"])))


def grid(rows: Rows, columns: Sequence, heads: Sequence[str], cell: Callable) -> str:
    """One row per mechanism, one column per (metric, context); nothing without columns."""
    if not columns:
        return ""
    lines = []
    for name in mechanisms(rows):
        found = [find(rows, name, metric, n) for metric, n in columns]
        lines.append((name, *(ABSENT if row is None else cell(row) for row in found)))
    return markdown(("", *heads), lines)


def mechanisms(rows: Rows) -> list[str]:
    """Their names in the order of the rows."""
    return list(dict.fromkeys(row["mechanism"] for row in rows))


def contexts(rows: Rows, metric: str) -> list[int]:
    """Lengths at which `metric` was measured."""
    return sorted({int(row["context"]) for row in rows if row["metric"] == metric})


def find(rows: Rows, mechanism: str, metric: str, context: int | None = None) -> dict | None:
    """The row of one number, None where it was not measured."""
    wanted = (mechanism, metric, "" if context is None else str(context))
    return next((r for r in rows if (r["mechanism"], r["metric"], r["context"]) == wanted), None)


def value(rows: Rows, mechanism: str, metric: str) -> float | None:
    """A number without a length."""
    row = find(rows, mechanism, metric)
    return None if row is None else float(row["value"])


def whole(number: float) -> str:
    """1234.4 -> "1,234"."""
    return f"{number:,.0f}"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; names to the left, numbers to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *lines))


def filled(page: str, rows: Rows) -> str:
    """The page with new tables between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(rows)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="*")
    files = parser.parse_args().files
    if files:
        rows = [row for file in files for row in read(file)]
        with CSV.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if not CSV.exists():
        parser.error(f"{CSV} is not there; name the compare.csv of a run")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), read(CSV)), encoding="utf-8")


if __name__ == "__main__":
    main()
