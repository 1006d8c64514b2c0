"""The golden vectors: no case is vacuous, none is unfair, and they can be made anew."""

from __future__ import annotations

import pytest
import torch

from openmsa.conformance import judge, load_case, shipped_cases
from openmsa.conformance.case import FOLDER, save_case
from openmsa.conformance.make import make
from openmsa.conformance.recipes import NAMES, RECIPES
from tests.conformance.tiny import OnlyAttends, Tiny
from tests.conformance.wrong import WRONG

CASES = {name: load_case(path) for name, path in shipped_cases().items()}
MISTAKES = [(name, engine) for name, engines in WRONG.items() for engine in engines]
every_case = pytest.mark.parametrize("name", CASES)


def told(verdicts) -> str:
    return "\n".join(f"{v.check}: {v.verdict} {v.why}" for v in verdicts)


@every_case
def test_a_right_engine_passes(name):
    verdicts = judge(Tiny(), CASES[name])
    assert verdicts and all(v.verdict == "pass" for v in verdicts), told(verdicts)


@pytest.mark.parametrize(("name", "engine"), MISTAKES, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_engine_fails(name, engine):
    verdicts = judge(engine(), CASES[name])
    assert any(v.verdict == "fail" for v in verdicts), told(verdicts)
    assert not any("raised" in v.why for v in verdicts), told(verdicts)


def test_every_case_has_a_wrong_engine():
    assert tuple(WRONG) == NAMES == tuple(CASES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_vectors_are_made_anew(recipe):
    """Inputs and selections to the bit; answers to what fp64 may differ by on another processor."""
    shipped, made = CASES[recipe.name], make(recipe)
    assert (made.trap, made.wrong) == (shipped.trap, shipped.wrong)
    for ours, theirs in [(made, shipped), *zip(made.steps, shipped.steps, strict=True)]:
        if ours.inputs is not None:
            assert ours.inputs.rule == theirs.inputs.rule
            pairs = (ours.inputs.tensors(), theirs.inputs.tensors())
            assert pairs[0].keys() == pairs[1].keys()
            for key in pairs[0]:
                assert pairs[0][key].dtype == pairs[1][key].dtype
                assert torch.equal(*(pair[key].nan_to_num(nan=9.0) for pair in pairs)), key
    for key, answer in shipped.expected.items():
        torch.testing.assert_close(made.expected[key], answer, rtol=1e-11, atol=1e-11)


def test_the_same_case_gives_the_same_bytes(tmp_path):
    for name, case in CASES.items():
        path = save_case(case, tmp_path)
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), name


def test_inputs_are_exact_in_every_dtype():
    for case in CASES.values():
        for inputs in [case.inputs, *(step.inputs for step in case.steps)]:
            for name, tensor in ({} if inputs is None else inputs.tensors()).items():
                if tensor.dtype == torch.float32:
                    for dtype in (torch.bfloat16, torch.float16):
                        same = tensor.to(dtype).float().nan_to_num(nan=9.0)
                        assert torch.equal(same, tensor.nan_to_num(nan=9.0)), name


def test_the_vectors_are_small_and_nothing_else_lies_there():
    sizes = [path.stat().st_size for path in FOLDER.glob("*.safetensors")]
    assert len(sizes) == len(NAMES) and sum(sizes) < 8e6


def test_what_an_engine_lacks_is_not_passed():
    verdicts = {v.check: v for v in judge(OnlyAttends(), CASES["plain"])}
    assert [c for c, v in verdicts.items() if v.verdict == "pass"] == ["out", "dq", "dk", "dv"]
    assert all(v.verdict != "fail" and v.why for v in verdicts.values() if v.verdict != "pass")
    for name in ("packing", "left_padding", "cache_crop"):
        assert {v.verdict for v in judge(OnlyAttends(), CASES[name])} == {"not offered"}


def test_an_engine_that_raises_fails_and_the_judge_goes_on():
    class Raises(Tiny):
        def select(self, x):
            raise RuntimeError("no blocks today")

    verdicts = judge(Raises(), CASES["plain"])
    assert verdicts[0].verdict == "fail" and "no blocks today" in verdicts[0].why
    assert all(v.verdict == "pass" for v in verdicts[1:])
