"""openmsa bench cpu --suite m3, with every side measured in this process."""

from __future__ import annotations

import csv

import pytest
import torch

from openmsa.accounting import m3_layer
from openmsa.accounting.m3_layer import Found
from openmsa.accounting.timing import Times
from openmsa.cli import main

COMMAND = ("bench", "cpu", "--quick", "--backend", "portable", "--suite", "m3", "--out")


@pytest.fixture
def measured(monkeypatch):
    """What was asked for, as (side, part, heads, tokens); outputs depend on the part only."""
    asked = []

    def measure(side, part, shape, tokens, *, hidden, chunk, seconds):
        asked.append((side, part, shape.h, tokens))
        slow = 1.0 if side == "openmsa" else 3.0
        return Found(Times((slow,)), int(slow * 1e6), torch.ones(2, 3))

    monkeypatch.setattr(m3_layer, "measure", measure)
    return asked


def read(path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_part_has_its_time_and_memory_beside_both_paths(tmp_path, measured, capsys):
    pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    assert main([*COMMAND, str(tmp_path)]) == 0
    rows = read(tmp_path / "cpu_m3.csv")
    assert len(rows) == 3 * 2 * 2 + 1
    assert {row["metric"] for row in rows} == {
        "prompt",
        "forward and backward",
        "one token",
        "peak above model and inputs",
    }
    for row in rows[:-1]:
        assert row["ratio"] == "3" and row["right"] == "yes" and "MiniMax-M3 with" in row["rival"]
    assert "cache included" in rows[-1]["note"] and rows[-1]["ratio"] == ""
    assert len(measured) == 3 * 3 + 1


@pytest.mark.parametrize(("free", "groups"), [(2.5, 2), (1.5, 1), (0.5, 0)])
def test_fewer_groups_are_compared_where_theirs_do_not_fit(
    tmp_path, measured, monkeypatch, free, groups
):
    pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    monkeypatch.setattr(m3_layer, "bytes_of_theirs", lambda part, shape, tokens: shape.g << 30)
    monkeypatch.setattr("openmsa.accounting.machine.available_bytes", lambda: int(free * 2**30))
    assert main([*COMMAND, str(tmp_path)]) == 0
    rows = read(tmp_path / "cpu_m3.csv")[:-1]
    alone = [row for row in rows if not row["rival"]]
    assert len(alone) == (0 if groups == 2 else 6)
    assert all("would need about 2 GB" in row["note"] for row in alone)
    beside = [row for row in rows if row["rival"]]
    assert len(beside) == (12 if groups else 0)
    assert all(("both on 1 of 2 groups" in row["note"]) == (groups == 1) for row in beside)


def test_what_does_not_fit_is_left_out_and_said(tmp_path, measured, monkeypatch, capsys):
    pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    monkeypatch.setattr(m3_layer, "bytes_of_ours", lambda part, *_: (part == "training") << 60)
    assert main([*COMMAND, str(tmp_path)]) == 0
    assert {row["metric"] for row in read(tmp_path / "cpu_m3.csv")} == {
        "prompt",
        "one token",
        "peak above model and inputs",
    }
    assert "training, 64, 8/2 heads left out: it needs about" in capsys.readouterr().err


def test_a_side_that_is_killed_is_a_note_and_the_rest_goes_on(tmp_path, measured, monkeypatch):
    pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    whole = m3_layer.measure

    def killed(side, *rest, **more):
        if side == "eager":
            raise MemoryError("the eager side was killed: out of memory")
        return whole(side, *rest, **more)

    monkeypatch.setattr(m3_layer, "measure", killed)
    assert main([*COMMAND, str(tmp_path)]) == 0
    rows = read(tmp_path / "cpu_m3.csv")
    assert sum("eager side was killed" in row["note"] for row in rows) == 6
    assert not any("eager" in row["rival"] for row in rows)
