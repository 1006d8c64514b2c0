"""Put what `openmsa conformance --json` found into one table, engines from several environments.

    python benchmarks/conformance.py runs/conformance/*.json

Writes results/conformance.csv, a row a check, and prints the table of docs/conformance.md.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from openmsa.conformance.recipes import NAMES

CSV = Path(__file__).parent / "results" / "conformance.csv"
COLUMNS = ("engine", "version", "dtype", "case", "check", "verdict", "why", "error", "allowed")
LETTERS = {"blocks": "S", "out": "O", "lse": "L", "loss": "K"}
LETTERS |= dict.fromkeys(("dq", "dk", "dv"), "G") | dict.fromkeys(("dq_index", "dk_index"), "I")


def rows_of(path: Path) -> list[dict]:
    """Every verdict of a json file, as a row."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for engine in found["engines"]:
        about = {"engine": engine["name"], "version": engine["version"], "dtype": found["dtype"]}
        rows += [
            about | {name: _short(v[name]) for name in COLUMNS[3:]} for v in engine["verdicts"]
        ]
    return rows


def _short(value: object) -> object:
    return f"{value:.2e}" if isinstance(value, float) else "" if value is None else value


def cell(rows: list[dict]) -> str:
    """What passed of a case, by letters, then what failed behind a cross; a dash for nothing."""
    words = {}
    for row in rows:
        words.setdefault(LETTERS.get(row["check"], "C"), set()).add(row["verdict"])
    passed = [letter for letter, seen in words.items() if seen == {"pass"}]
    failed = [letter for letter, seen in words.items() if "fail" in seen]
    text = " ".join([*passed, *(["✗", *failed] if failed else [])])
    return text or "–"


def table(rows: list[dict]) -> str:
    """A row a case, a column an engine; engines that agree in everything share a column."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        cells = tuple(cell([row for row in own if row["case"] == case]) for case in NAMES)
        columns.setdefault(cells, []).append(engine)
    lines = [["case", *(", ".join(engines) for engines in columns.values())]]
    lines += [[f"`{case}`", *(cells[i] for cells in columns)] for i, case in enumerate(NAMES)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Read the files named on the command line."""
    rows = [row for path in sys.argv[1:] for row in rows_of(Path(path))]
    with CSV.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
