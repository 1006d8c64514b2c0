"""Rows of measured numbers: one schema, appended, with the machine's state."""

from __future__ import annotations

import datetime

from openmsa.accounting import machine, rows


def test_rows_are_added_under_one_heading(tmp_path):
    path = tmp_path / "new" / "a.csv"
    shared = rows.common("openmsa bench")
    for number in range(2):
        rows.append(path, [{**shared, "what": f"line {number}", "p50": number}])
    found = rows.read(path)
    assert [row["what"] for row in found] == ["line 0", "line 1"]
    assert tuple(found[0]) == rows.COLUMNS
    assert found[0]["date"] == datetime.date.today().isoformat()
    assert found[0]["command"] == "openmsa bench" and found[0]["p20"] == ""


def test_the_machine_says_what_it_is():
    assert "threads" in machine.processor()
    assert machine.cores() >= 1
    assert machine.commit()


def test_code_outside_a_repository_names_its_version(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit().startswith("openmsa") or machine.commit() == "unknown"


def test_memory_is_told_where_the_system_tells_it():
    if machine.available_bytes() is not None:
        assert 0 < machine.resident_bytes() <= machine.peak_bytes()
