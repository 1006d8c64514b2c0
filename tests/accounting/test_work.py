"""FLOPs and bytes against counting one by one, and against the numbers that the paper prints."""

from __future__ import annotations

import pytest
import torch

from openmsa import Selection, select_blocks
from openmsa.accounting import work
from tests.support import borders, index_qk, readable

PAPER = {"h": 64, "g": 4, "d": 128, "budget": 2048}


@pytest.mark.parametrize(("t", "s"), [(0, 5), (1, 1), (1, 9), (4, 9), (9, 9)])
def test_causal_pairs_are_those_of_the_mask(t, s):
    assert work.causal_pairs(t, s) == int(torch.ones(s, s).tril()[s - t :].sum())


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="t=3 .* s=2"):
        work.causal_pairs(3, 2)


@pytest.mark.parametrize(("t", "s", "size"), [(50, 50, 8), (7, 61, 8), (1, 33, 16)])
def test_selected_pairs_are_those_of_the_definition(t, s, size):
    q_index, k_index = index_qk(2, t, s, 3, 8)
    selection = select_blocks(q_index, k_index, block_size=size, top_k=3)
    counted = int(readable(t, s, selection.blocks, size).sum())
    assert work.selected_pairs(selection, s) == counted > 0


def test_what_no_query_reads_is_no_pair():
    blocks = torch.tensor([[[[1, 1, 5, -1], [0, -3, 1, 99]]]], dtype=torch.int32)
    # Queries at 6 and 7 of 8, blocks of 4: the first reads keys 4 to 6, the second all 8.
    assert work.selected_pairs(Selection(blocks, 4), 8) == 3 + 8


def test_packed_pairs_are_the_sum_over_sequences():
    tq, sk = (5, 1, 30), (5, 40, 33)
    q_index, k_index = index_qk(1, sum(tq), sum(sk), 2, 8)
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    selection = select_blocks(q_index, k_index, block_size=8, top_k=2, **packed)
    total = 0
    for blocks, t, s in zip(selection.blocks.split(tq, 2), tq, sk):
        total += int(readable(t, s, blocks, 8).sum())
    assert work.selected_pairs(selection, sum(sk), **packed) == total
    assert work.packed_causal_pairs(list(tq), list(sk)) == 15 + 40 + sum(range(4, 34))


def test_a_long_selection_is_counted_in_pieces_that_fit_together():
    t = 9000
    own = (torch.arange(t) // 4).to(torch.int32).view(1, 1, t, 1)
    assert work.selected_pairs(Selection(own, 4), t) == t // 4 * (1 + 2 + 3 + 4)


def test_formulas_count_each_product_once():
    r, d, dv, di, pairs = 3, 5, 7, 11, 13
    assert work.select_flops(pairs, 2, di) == pairs * 2 * (2 * di)
    assert work.attend_flops(pairs, r, d, dv) == pairs * r * (2 * d + 2 * dv)
    forward_again, dp, dq, dk, dv_product = 2 * d, 2 * dv, 2 * d, 2 * d, 2 * dv
    parts = forward_again + dp + dq + dk + dv_product
    assert work.attend_backward_flops(pairs, r, d, dv) == pairs * r * parts
    assert work.index_loss_flops(pairs, r, d, di) == pairs * (r * 2 * d + 3 * 2 * di)


@pytest.mark.parametrize(("s", "ratio"), [(1 << 15, 6.40), (1 << 17, 16.0), (1 << 20, 28.44)])
def test_dense_against_sparse_prefill_is_equation_12(s, ratio):
    """Their convention: causal halves for what is quadratic, the budget in full for what is not."""
    h, g, d = PAPER["h"], PAPER["g"], PAPER["d"]
    dense = work.attend_flops(s * s // 2 * g, h // g, d, d)
    sparse = work.select_flops(s * s // 2, g, d)
    sparse += work.attend_flops(s * PAPER["budget"] * g, h // g, d, d)
    assert dense / sparse == pytest.approx(ratio, rel=1e-3)


def test_decoding_at_one_million_reads_what_the_paper_says():
    s, g, d = 1 << 20, PAPER["g"], PAPER["d"]
    dense = work.dense_decode_bytes(s, g, d=d, d_value=d, element_bytes=2)
    pairs = g * PAPER["budget"]
    sparse = work.decode_bytes(s, pairs, d_index=d, d=d, d_value=d, element_bytes=2)
    assert dense / sparse == pytest.approx(7.88, abs=0.005)
