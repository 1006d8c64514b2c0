"""Our backends pass everything; other engines, where installed, pass and fail what the docs say."""

from __future__ import annotations

import pytest
import torch

from openmsa.conformance import judge, load_case, shipped_cases
from openmsa.conformance.adapters import ENGINES, open_adapter

CASES = {name: load_case(path) for name, path in shipped_cases().items()}


def failures(adapter, dtype=torch.float32) -> list[str]:
    verdicts = [v for case in CASES.values() for v in judge(adapter, case, dtype=dtype)]
    assert any(v.verdict == "pass" for v in verdicts)
    return [f"{v.case} {v.check}: {v.why}" for v in verdicts if v.verdict == "fail"]


def engine(name: str):
    """An adapter, or a skipped test where its engine is not installed."""
    try:
        return open_adapter(name)
    except ValueError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", ["reference", "portable", "cpu"])
def test_our_backends_pass(name):
    ours = engine(name)
    assert failures(ours) == []
    verdicts = [v.verdict for case in CASES.values() for v in judge(ours, case)]
    assert set(verdicts) == {"pass"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_our_fastest_backend_passes_in_short_dtypes(dtype):
    assert failures(engine("cpu"), dtype) == []


# What each fails, and why, is told in docs/conformance.md.
KNOWN = {
    "transformers": {
        "ties",
        "zeros",
        "signed_zeros",
        "nan_scores",
        "left_padding",
        "packing",
        "no_selection",
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_other_engines_fail_what_is_known(name):
    found = failures(engine(name))
    assert {line.split()[0] for line in found} == KNOWN[name], found


def test_adapters_are_found_by_name_and_by_module():
    assert open_adapter("reference").name == "reference"
    assert open_adapter("tests.conformance.tiny:Tiny").name == "tiny"
    with pytest.raises(ValueError, match="no adapter 'vllm'"):
        open_adapter("vllm")
    for wrong in ("nowhere:Engine", "tests.conformance.tiny:Nobody"):
        with pytest.raises(ValueError, match="cannot be loaded"):
            open_adapter(wrong)
    assert all(engine.install for name, engine in ENGINES.items() if "ours" not in engine.where)
