"""One layer: the paper's figures to three digits, and the laws of counting."""

from __future__ import annotations

import dataclasses

import pytest

from openmsa.accounting import chips, designs, layer_cost, shapes, work
from openmsa.accounting.layer_cost import Assumptions, flops, num_bytes

M = 1 << 20
PAPER = shapes.find("msa-109b")
MSA, DENSE = designs.make("msa"), designs.make("dense")
GIVEN = Assumptions()
H800 = chips.find("h800")


def seconds(works) -> float:
    return sum(w.seconds(H800, GIVEN) for w in works)


@pytest.mark.parametrize(
    ("thousands", "ratio"),
    [(4, 0.97), (8, 1.88), (16, 3.56), (32, 6.40), (64, 10.67), (128, 16.00), (512, 25.60)],
)
def test_equation_12(thousands, ratio):
    dense, msa = layer_cost.paper_flops(PAPER, thousands << 10, MSA)
    assert dense / msa == pytest.approx(ratio, abs=0.005)


def test_the_papers_28_4_at_one_million():
    dense, msa = layer_cost.paper_flops(PAPER, M, MSA)
    assert round(dense / msa, 1) == 28.4
    # Figure 4: G FLOP per token.
    assert dense / M == pytest.approx(17.18e9, rel=1e-3)
    assert msa / M == pytest.approx(0.604e9, rel=1e-3)


@pytest.mark.parametrize(("d_index", "ratio"), [(32, 85.33), (64, 51.20), (256, 15.06)])
def test_other_widths_of_the_index(d_index, ratio):
    design = designs.make("msa", {"d_index": d_index})
    dense, msa = layer_cost.paper_flops(PAPER, M, design)
    assert dense / msa == pytest.approx(ratio, abs=0.005)


def test_the_papers_break_even_at_4_2_thousand():
    even = layer_cost.paper_break_even(PAPER, MSA)
    assert round(even / 1000, 1) == 4.2 and round(even) == 4228
    dense, msa = layer_cost.paper_flops(PAPER, round(even), MSA)
    assert dense == pytest.approx(msa, rel=1e-3)
    wide = designs.make("msa", {"d_index": 1 << 20})
    assert layer_cost.paper_break_even(PAPER, wide) == float("inf")


def test_exact_counting_saves_a_little_more_than_equation_12():
    """Equation 12 charges the whole budget where fewer keys are visible."""
    index, main = layer_cost.prefill(MSA, PAPER, M, GIVEN)
    dense = flops(layer_cost.prefill(DENSE, PAPER, M, GIVEN))
    assert main.flops / (4 * 64 * 128 * M) == pytest.approx(1982.6, abs=0.05)
    assert dense / (index.flops + main.flops) == pytest.approx(28.55, abs=0.005)
    assert layer_cost.break_even(MSA, PAPER, GIVEN) == 2414


@pytest.mark.parametrize(
    ("thousands", "ratio"),
    [(4, 1.60), (8, 2.67), (16, 4.00), (32, 5.33), (128, 7.11), (512, 7.76), (1024, 7.88)],
)
def test_bytes_of_decoding(thousands, ratio):
    dense, msa = (
        num_bytes(layer_cost.decode(x, PAPER, thousands << 10, GIVEN)) for x in (DENSE, MSA)
    )
    assert dense / msa == pytest.approx(ratio, rel=5e-3)


def test_the_last_token_saves_more_than_the_mean():
    dense, msa = (flops(layer_cost.decode(x, PAPER, M, GIVEN)) for x in (DENSE, MSA))
    assert dense / msa == pytest.approx(30.1, abs=0.05)


def test_traffic_of_the_main_branch():
    """844 GB a layer at 1M by blocks (paper, section 3.2); by queries it would be 4.4 TB."""
    _, main = layer_cost.prefill(MSA, PAPER, M, GIVEN)
    assert main.num_bytes == pytest.approx(844e9, rel=2e-3)
    bare = dataclasses.replace(GIVEN, on_chip_bytes=0)
    fetched = layer_cost.prefill(designs.make("dsa"), PAPER, M, bare)[1]
    assert fetched.num_bytes == pytest.approx(2 * (1024 * 2048 + 64 * 256) * M, rel=2e-3)


def test_seconds_are_those_measured_for_dense_and_a_bound_for_msa():
    """Figure 4 at 1M, one layer on an H800; efficiencies are those of its dense attention."""
    assert seconds(layer_cost.prefill(DENSE, PAPER, M, GIVEN)) == pytest.approx(29.05, rel=0.02)
    assert seconds(layer_cost.decode(DENSE, PAPER, M, GIVEN)) == pytest.approx(0.833e-3, rel=0.02)
    assert 0.5 * 2.06 < seconds(layer_cost.prefill(MSA, PAPER, M, GIVEN)) < 2.06
    assert 0.9 * 0.109e-3 < seconds(layer_cost.decode(MSA, PAPER, M, GIVEN)) < 0.109e-3


def test_dense_and_msa_agree_with_the_counts_of_the_operations():
    s, shape = 3000, PAPER
    pairs = work.causal_pairs(s, s)
    index, main = layer_cost.prefill(MSA, shape, s, GIVEN)
    assert index.flops == work.select_flops(pairs, shape.g, 128)
    (dense,) = layer_cost.prefill(DENSE, shape, s, GIVEN)
    assert dense.flops == work.attend_flops(pairs * shape.g, shape.r, 128, 128)
    assert main.flops < dense.flops


@pytest.mark.parametrize("name", designs.DESIGNS)
def test_a_prompt_is_the_sum_of_its_steps_in_flops(name):
    changes = {"dense_tokens": 0} if name == "infllm2" else {}
    design, s = designs.make(name, changes), 700
    steps = sum(flops(layer_cost.decode(design, PAPER, n, GIVEN)) for n in range(1, s + 1))
    assert flops(layer_cost.prefill(design, PAPER, s, GIVEN)) == steps


@pytest.mark.parametrize("name", designs.DESIGNS)
def test_long_prompts_are_counted_in_pieces_that_fit_together(name, monkeypatch):
    design = designs.make(name)
    whole = layer_cost.prefill(design, PAPER, 20000, GIVEN)
    monkeypatch.setattr(layer_cost, "PIECE", 999)
    assert layer_cost.prefill(design, PAPER, 20000, GIVEN) == whole


def test_break_even_is_where_it_turns():
    for name in ("msa", "nsa", "dsa", "window"):
        design = designs.make(name)
        for of, count, total in (
            ("flops", layer_cost.prefill, flops),
            ("bytes", layer_cost.decode, num_bytes),
        ):
            at = layer_cost.break_even(design, PAPER, GIVEN, of=of)
            ours, dense = (
                [total(count(x, PAPER, s, GIVEN)) for s in (at - 1, at)] for x in (design, DENSE)
            )
            assert ours[0] >= dense[0] and ours[1] < dense[1], (name, of)
    assert layer_cost.break_even(DENSE, PAPER, GIVEN, limit=1 << 12) is None


def test_msa_keeps_an_eighth_more():
    dense, msa = (layer_cost.cache_bytes(x, PAPER, M, GIVEN) for x in (DENSE, MSA))
    assert msa / dense == 1.125 and dense == M * 2048
    fp8 = designs.make("msa", {"index_bytes": 1})
    assert layer_cost.cache_bytes(fp8, PAPER, M, GIVEN) == M * (2048 + 128)


def test_narrow_index_keys_take_fp8_products_where_the_chip_has_them():
    index, main = layer_cost.prefill(designs.make("msa", {"index_bytes": 1}), PAPER, M, GIVEN)
    assert (index.element_bytes, main.element_bytes) == (1, 2)
    full, _ = layer_cost.prefill(MSA, PAPER, M, GIVEN)
    assert index.seconds(H800, GIVEN) == pytest.approx(full.seconds(H800, GIVEN) * 989 / 1979)
    a100 = chips.find("a100")
    assert index.seconds(a100, GIVEN) == full.seconds(a100, GIVEN)


def test_latent_attention_is_unfolded_for_dense_prompts_only():
    shape = shapes.find("deepseek-v3.2")
    (dense,) = layer_cost.prefill(DENSE, shape, 100, GIVEN)
    assert dense.flops == 2 * 128 * (192 + 128) * 5050
    (step,) = layer_cost.decode(DENSE, shape, 100, GIVEN)
    assert step.flops == 2 * 128 * (576 + 512) * 100
    assert layer_cost.cache_bytes(DENSE, shape, 100, GIVEN) == 2 * 576 * 100
    tokens = layer_cost.prefill(designs.make("dsa"), shape, 100, GIVEN)[1]
    assert tokens.flops == 2 * 128 * (576 + 512) * 5050


def test_what_fits_on_the_chip_is_fetched_once():
    """Keys and values of 8K tokens are 16.8 MB: all fit; of 64K 134 MB: 50 MB of them do."""
    design = designs.make("dsa")
    bare, wide = (dataclasses.replace(GIVEN, on_chip_bytes=x) for x in (0, 1e12))
    short = [layer_cost.prefill(design, PAPER, 8192, g)[1] for g in (GIVEN, wide, bare)]
    assert short[0] == short[1] and short[2].num_bytes > 10 * short[0].num_bytes
    some, none = (layer_cost.prefill(design, PAPER, 65536, g)[1] for g in (GIVEN, bare))
    assert some.flops == none.flops
    assert some.num_bytes / none.num_bytes == pytest.approx(1 - 50 / 134.2, rel=0.01)
