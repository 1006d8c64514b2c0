"""Whole models: published sizes, seconds, dollars, and what memory holds."""

from __future__ import annotations

import dataclasses

import pytest

from openmsa.accounting import chips, cost, designs, shapes
from openmsa.accounting.layer_cost import Assumptions

SHAPE, CHIP, GIVEN = shapes.find("llama3-8b"), chips.find("h100"), Assumptions()
ALL = {name: designs.make(name) for name in designs.DESIGNS}


def estimate(name="dense", shape=SHAPE, chip=CHIP, s=8192, count=1, **given) -> cost.Estimate:
    return cost.estimate(name, ALL[name], shape, chip, s, count, Assumptions(**given))


def test_short_prompts_take_two_flops_a_weight():
    shape, s = SHAPE, 512
    found = estimate(s=s)
    body = shape.total_weights - 2 * shape.head_weights
    rest = 2 * s * body + 2 * shape.head_weights
    attention = 32 * 4 * 32 * 128 * s * (s + 1) // 2
    assert found.prefill_attention_flops_share == pytest.approx(attention / (attention + rest))
    assert found.prefill_seconds == pytest.approx((attention + rest) / (0.63 * 989e12), rel=0.05)


def test_decoding_reads_weights_once_and_caches_for_each_sequence():
    one, many = estimate(batch=1), estimate(batch=16)
    rate = 0.77 * 3.35e12
    read = 2 * (SHAPE.total_weights - SHAPE.head_weights)
    cache = 32 * 8192 * 4096
    assert one.decode_seconds_per_step == pytest.approx((read + cache) / rate, rel=0.01)
    assert many.decode_seconds_per_step == pytest.approx((read + 16 * cache) / rate, rel=0.01)
    assert many.decode_seconds_per_token * 16 == many.decode_seconds_per_step
    assert one.decode_attention_share == pytest.approx(cache / (read + cache), rel=0.01)


def test_dollars_are_hours_of_all_chips():
    found = estimate(count=3, batch=4)
    hours = found.prefill_seconds * 3 / 3600
    assert found.dollars_per_million_prompt == pytest.approx(hours * 2.95 / 8192 * 1e6)
    hours = found.decode_seconds_per_step * 3 / 3600
    assert found.dollars_per_million_generated == pytest.approx(hours * 2.95 / 4 * 1e6)
    alone = estimate(count=1, batch=4)
    assert alone.dollars_per_million_prompt == pytest.approx(found.dollars_per_million_prompt)
    assert alone.prefill_seconds == pytest.approx(3 * found.prefill_seconds)


def test_a_chip_without_a_price_costs_no_dollars():
    found = estimate(chip=chips.find("h800"))
    assert found.dollars_per_million_prompt is found.dollars_per_million_generated is None
    assert found.prefill_seconds > 0


def test_chips_hold_weights_and_caches():
    s, given = 1 << 17, Assumptions(batch=8)
    need = 2 * SHAPE.total_weights + 8 * 32 * s * 4096
    fewest = cost.chips_needed([ALL["dense"]], SHAPE, CHIP, s, given)
    assert (fewest - 1) * 0.9 * 80e9 < need <= fewest * 0.9 * 80e9
    assert cost.chips_needed(ALL.values(), SHAPE, CHIP, s, given) >= fewest
    assert estimate(s=s, count=fewest).fits and not estimate(s=s, count=fewest - 1).fits


def test_layers_that_stay_dense_are_charged_as_dense():
    kept = dataclasses.replace(SHAPE, dense_attention_layers=SHAPE.layers)
    ours, dense = estimate("msa", kept, s=1 << 16), estimate("dense", kept, s=1 << 16)
    assert ours.prefill_seconds == dense.prefill_seconds
    assert ours.cache_bytes == dense.cache_bytes and ours.weight_bytes == dense.weight_bytes
    some = dataclasses.replace(SHAPE, dense_attention_layers=8)
    between = estimate("msa", some, s=1 << 16).prefill_seconds
    assert estimate("msa", s=1 << 16).prefill_seconds < between < dense.prefill_seconds


def test_the_index_adds_what_the_paper_says():
    """1.97 M weights a layer at d_model 3072 (81 M in 41 layers)."""
    shape = shapes.find("msa-109b")
    assert ALL["msa"].extra_weights(shape) == pytest.approx(1.97e6, rel=2e-3)
    added = [cost.model_weight_bytes(ALL[name], shape, GIVEN) for name in ("dense", "msa")]
    assert (added[1] - added[0]) / 2 == pytest.approx(81e6, rel=5e-3)


def test_experts_met_grow_with_the_batch():
    shape = shapes.find("minimax-m3")
    one, some, all_ = (shape.ffn_weights(t) for t in (1, 32, 1e6))
    assert one < some < all_ == pytest.approx(shape.ffn_weights())
    expert = 57 * 3 * 6144 * 3072
    assert shape.ffn_weights(2) - one == pytest.approx(expert * (4 - 4 * 4 / 128))


@pytest.mark.parametrize("name", designs.DESIGNS)
@pytest.mark.parametrize("s", [1, 100, 1 << 13])
def test_every_mechanism_has_a_price_at_any_length(name, s):
    found = estimate(name, s=s)
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if isinstance(value, float):
            assert value >= 0 and value == value and value != float("inf"), field.name
    assert 0 < found.prefill_attention_share < 1 and 0 < found.decode_attention_share < 1
