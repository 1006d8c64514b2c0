"""One schema for every measured number: a row of a csv."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from openmsa.accounting import machine

COLUMNS = (
    "what",
    "shape",
    "metric",
    "unit",
    "p20",
    "p50",
    "p80",
    "device",
    "commit",
    "date",
    "command",
)


def common(command: str) -> dict[str, str]:
    """What all rows of a run share."""
    return {
        "device": machine.device(),
        "commit": machine.commit(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def append(path: Path, rows: Iterable[dict], columns: Sequence[str] = COLUMNS) -> Path:
    """Append rows to a csv, with a heading if it is new. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
