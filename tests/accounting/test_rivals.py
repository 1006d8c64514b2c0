"""What torch is asked for is the same attention, and a scaled measurement says so."""

from __future__ import annotations

import pytest
import torch

from openmsa.accounting import inputs, rivals, work
from openmsa.accounting.inputs import Shape

SHAPE = Shape(h=6, g=2, d=16, d_index=16, block_size=8, top_k=3)


@pytest.fixture
def calls(monkeypatch):
    """The shapes SDPA was called with: (query shape, key shape, causal)."""
    seen = []

    def record(q, k, v, is_causal=False, enable_gqa=False):
        seen.append((tuple(q.shape), tuple(k.shape), is_causal))
        return torch.zeros(*q.shape[:-1], v.shape[-1]) + q.sum() + k.sum() + v.sum()

    monkeypatch.setattr(rivals, "sdpa", record)
    return seen


def test_queries_behind_a_prefix_read_the_prefix_and_the_causal_rest(calls):
    x = inputs.make(SHAPE, 10, 50, torch.float32)
    rival = rivals.prefill(x, seconds=0)
    shapes = {((1, 6, 10, 16), (1, 6, 10, 16), True), ((1, 6, 10, 16), (1, 6, 40, 16), False)}
    assert set(calls) == shapes
    assert rival.scaled == 1 and "scaled" not in rival.words


def test_a_part_of_the_heads_is_scaled_and_told(calls):
    x = inputs.make(SHAPE, 20, 20, torch.float32)
    one = work.attend_flops(work.causal_pairs(20, 20), 1, 16, 16)
    rival = rivals.prefill(x, seconds=0, flops=2.5 * one)
    assert {q[1] for q, _, _ in calls} == {2}
    assert rival.scaled == 3 and "2 of 6 heads, scaled" in rival.words


@pytest.mark.parametrize(("flops", "heads"), [(0, 1), (2.9, 2), (3, 3), (5, 3), (6, 6), (99, 6)])
def test_measured_heads_divide_all(flops, heads):
    x = inputs.make(SHAPE, 20, 20, torch.float32)
    one = work.attend_flops(work.causal_pairs(20, 20), 1, 16, 16)
    assert rivals.heads_measured(x, 20, flops * one) == heads


def test_every_query_head_gets_its_own_kv_head():
    x = inputs.make(SHAPE, 5, 9, torch.float32)
    for heads in (2, 6):
        q, k, v = rivals._heads_first(x, heads)
        for head in range(heads):
            assert torch.equal(q[0, head], x.q[0, :, head])
            assert torch.equal(k[0, head], x.k[0, :, head // 3])
            assert torch.equal(v[0, head], x.v[0, :, head // 3])


def test_decoding_is_measured_on_one_group(calls):
    x = inputs.make(SHAPE, 1, 30, torch.float32)
    rival = rivals.decode(x, seconds=0)
    assert set(calls) == {
        ((1, 3, 1, 16), (1, 1, 30, 16), False),
        ((1, 1, 3, 16), (1, 1, 30, 16), False),
    }
    assert rival.scaled == 2 and "1 of 2 groups, scaled" in rival.words


def test_backward_is_that_of_causal_attention():
    x = inputs.make(SHAPE, 12, 12, torch.float32)
    rival = rivals.backward(x, torch.ones_like(x.q), seconds=0)
    assert rival.times.median > 0 and rival.scaled == 1
