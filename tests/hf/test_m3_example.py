"""The example that shows what a frozen index costs, on next to nothing."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

from tests.hf.m3_tiny import modelling

EXAMPLE = Path(__file__).parents[2] / "examples" / "m3_frozen_index.py"


def test_it_runs_and_keeps_its_numbers(tmp_path, monkeypatch, capsys):
    assert modelling is not None
    out = tmp_path / "found" / "frozen.csv"
    size = ["--steps", "2", "--tokens", "48", "--batch", "2", "--seeds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *size])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    told = {(row["what"], row["metric"]) for row in rows}
    ways = {"before", "frozen index", "trained index", "warmed index", "full attention"}
    assert told == {(way, m) for way in ways for m in ("right", "loss", "found")} - {
        ("full attention", "found")
    }
    assert all(row["commit"] and row["device"] for row in rows)
    assert len(rows) == 2 * len(told) and {row["seed"] for row in rows} == {"0", "1"}
    assert "frozen index" in capsys.readouterr().out
