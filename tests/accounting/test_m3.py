"""transformers' attention and ours are given the same layer, and their results are compared."""

from __future__ import annotations

import pytest
import torch

from openmsa.accounting import m3
from openmsa.accounting.inputs import Shape

pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")

SHAPE = Shape(h=4, g=2, d=16, d_index=16, block_size=8, top_k=3)


def job(side: str, told) -> dict:
    return {
        "side": side,
        "shape": vars(SHAPE),
        "tokens": 60,
        "seconds": 0.0,
        "backend": "portable",
        "instruction_set": "",
        "threads": torch.get_num_threads(),
        "told": str(told),
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What both sides leave, measured in this process."""
    folder = tmp_path_factory.mktemp("m3")
    for side in m3.SIDES:
        m3.run_side(job(side, folder / side))
    return {side: torch.load(folder / side) for side in m3.SIDES}


def test_both_sides_compute_the_same(told):
    assert told["openmsa"]["ok"]
    verdict = m3._same(told["transformers"], told["openmsa"])
    assert verdict.ok and "6 of 6 sampled tokens" in verdict.words


def test_other_outputs_and_other_blocks_are_noticed(told):
    theirs, ours = told["transformers"], dict(told["openmsa"])
    ours["out"] = 1.5 * ours["out"]
    assert not m3._same(theirs, ours).ok
    ours["blocks"] = ours["blocks"] + 1
    assert "no sampled token" in m3._same(theirs, ours).words


def test_fewer_groups_are_measured_where_masks_would_not_fit():
    one = m3.group_bytes(SHAPE, 1000)
    assert m3.groups_that_fit(SHAPE, 1000, 3 * one) == 2
    assert m3.groups_that_fit(SHAPE, 1000, 2 * one) == 1
    assert m3.groups_that_fit(SHAPE, 1000, one) == 0
    assert m3.groups_that_fit(SHAPE, 1000, None) == 1


@pytest.mark.slow
def test_each_side_runs_in_a_process_of_its_own():
    found = m3.compare(SHAPE, 256, 1, seconds=0.01, backend="portable", instruction_set="")
    assert found.verdict.ok and found.groups == 1
    assert min(side.times.median for side in (found.ours, found.theirs)) > 0


@pytest.mark.slow
def test_a_side_that_fails_says_why():
    with pytest.raises(RuntimeError, match="openmsa side .* backend='abacus'"):
        m3.compare(SHAPE, 64, 1, seconds=0.01, backend="abacus", instruction_set="")
