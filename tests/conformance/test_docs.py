"""docs/conformance.md shows what was found, and no more."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.conformance import CSV, table
from openmsa.conformance.adapters import ENGINES
from openmsa.conformance.recipes import NAMES

ROWS = list(csv.DictReader(CSV.read_text(encoding="utf-8").splitlines()))
DOCS = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")


def test_the_table_is_what_was_found():
    assert table(ROWS) in DOCS


def test_every_engine_was_judged_and_its_version_is_told():
    judged = {row["engine"]: row["version"] for row in ROWS}
    assert set(judged) <= set(ENGINES) and set(ENGINES) - set(judged) <= {"triton"}
    for version in judged.values():
        for part in version.removesuffix(" (eager model)").split(", "):
            assert part in DOCS


def test_the_number_of_cases_is_told():
    assert f"{len(NAMES)} cases" in DOCS
