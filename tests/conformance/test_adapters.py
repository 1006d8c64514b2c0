"""Our backends pass everything; other engines, where installed, fail what the docs say."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks.conformance import CSV
from openmsa.conformance import judge, load_case, shipped_cases
from openmsa.conformance.adapters import ENGINES, open_adapter

CASES = {name: load_case(path) for name, path in shipped_cases().items()}
OURS = [name for name, engine in ENGINES.items() if ".ours:" in engine.where]
FOUND = list(csv.DictReader(CSV.read_text(encoding="utf-8").splitlines()))


def verdicts(adapter, dtype=torch.float32) -> list:
    return [v for case in CASES.values() for v in judge(adapter, case, dtype=dtype)]


def engine(name: str):
    """An adapter, or a skipped test where its engine is not installed."""
    try:
        return open_adapter(name)
    except ValueError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", ["reference", "portable", "cpu"])
def test_our_backends_pass_everything(name):
    assert [v for v in verdicts(engine(name)) if v.verdict != "pass"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_our_fastest_backend_passes_in_short_dtypes(dtype):
    assert [v for v in verdicts(engine("cpu"), dtype) if v.verdict != "pass"] == []


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in OURS])
def test_other_engines_do_what_was_found(name):
    """Where the very version is installed that docs/conformance.md speaks of."""
    theirs, told = engine(name), [row for row in FOUND if row["engine"] == name]
    if theirs.version() != told[0]["version"]:
        pytest.skip(f"{theirs.version()} is here, {told[0]['version']} was judged")
    now = [(v.case, v.check, v.verdict) for v in verdicts(theirs)]
    assert now == [(row["case"], row["check"], row["verdict"]) for row in told]


def test_adapters_are_found_by_name_and_by_module():
    assert open_adapter("reference").name == "reference"
    assert open_adapter("tests.conformance.tiny:Tiny").name == "tiny"
    with pytest.raises(ValueError, match="no adapter 'vllm'"):
        open_adapter("vllm")
    for wrong in ("nowhere:Engine", "tests.conformance.tiny:Nobody"):
        with pytest.raises(ValueError, match="cannot be loaded"):
            open_adapter(wrong)
    assert all(ENGINES[name].install for name in ENGINES if name not in OURS)
