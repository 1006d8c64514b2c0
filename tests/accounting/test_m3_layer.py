"""A layer of MiniMax-M3, enabled and not: both sides are given the same work, and are compared."""

from __future__ import annotations

import pytest
import torch

from openmsa.accounting import m3_layer
from openmsa.accounting.inputs import Shape
from openmsa.accounting.m3_layer import Found
from openmsa.accounting.timing import Times

pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")

SHAPE = Shape(h=4, g=2, d=16, d_index=16, block_size=8, top_k=3)


def found(side: str, part: str, folder, chunk: int = 0) -> Found:
    """One side, measured in this process."""
    job = {"side": side, "part": part, "shape": vars(SHAPE), "tokens": 60, "hidden": 32}
    job |= {"chunk": chunk, "seconds": 0.0, "threads": torch.get_num_threads()}
    m3_layer.run_side({**job, "told": str(folder / side)})
    told = torch.load(folder / side)
    return Found(Times(tuple(told["seconds"])), told["peak_bytes"], told["out"])


@pytest.mark.parametrize("part", m3_layer.PARTS)
def test_all_sides_compute_the_same(part, tmp_path):
    ours = found("openmsa", part, tmp_path)
    for side in ("sdpa", "eager"):
        verdict = m3_layer.same(ours, found(side, part, tmp_path))
        assert verdict.ok, verdict.words
    assert not m3_layer.same(Found(ours.times, 0, 2 * ours.out), ours).ok


def test_a_prompt_in_chunks_ends_where_the_whole_prompt_ends(tmp_path):
    whole, parts = (found("openmsa", "forward", tmp_path, chunk) for chunk in (0, 20))
    torch.testing.assert_close(parts.out[-1], whole.out[-1], atol=0.05, rtol=0.05)


def test_memory_of_transformers_is_guessed_from_its_masks():
    forward, training = (m3_layer.bytes_of_theirs(p, SHAPE, 1000) for p in ("forward", "training"))
    assert forward >= SHAPE.h * 1000 * 1000 * 4 and training > forward
    assert m3_layer.bytes_of_theirs("decode", SHAPE, 2000) < forward
    assert m3_layer.on_groups(SHAPE, 1) == Shape(h=2, g=1, d=16, d_index=16, block_size=8, top_k=3)


@pytest.mark.slow
def test_each_side_runs_in_a_process_of_its_own():
    how = {"hidden": 32, "chunk": 0, "seconds": 0.01}
    ours, theirs = (m3_layer.measure(s, "forward", SHAPE, 64, **how) for s in ("openmsa", "sdpa"))
    assert m3_layer.same(ours, theirs).ok and ours.times.median > 0
