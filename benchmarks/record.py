"""Rows of measured numbers in benchmarks/results, in the one schema of openmsa.accounting.rows."""

from __future__ import annotations

import sys
from pathlib import Path

from openmsa.accounting.rows import append, common

RESULTS = Path(__file__).parent / "results"


def record(file: str, rows: list[dict]) -> Path:
    """Append rows to benchmarks/results/<file>.csv; device, commit, date and command are added.

    A row names what, shape, metric, unit and p50, and p20 and p80 where a measurement was repeated.
    """
    shared = common(" ".join(["python", *sys.argv]))
    return append(RESULTS / f"{file}.csv", [{**shared, **row} for row in rows])
