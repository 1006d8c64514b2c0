"""The shipped shapes add up to what their source says, and are cut down honestly."""

from __future__ import annotations

import pytest

from openmsa.accounting import work, workloads


def test_prefill_covers_the_weight_its_source_names():
    cases = workloads.cases("prefill")
    assert len(cases) == 45
    assert sum(case.weight for case in cases) == 13_702
    for case in cases:
        assert all((s - q) % 128 == 0 for q, s in zip(case.query_lens, case.key_lens))


def test_decode_is_28_cases_of_8_tokens():
    cases = workloads.cases("decode")
    assert len(cases) == 28 and sum(case.weight for case in cases) == 10_000
    for case in cases:
        assert set(case.query_lens) == {8} and min(case.key_lens) >= 8
    eight = next(c for c in cases if c.name.startswith("8 requests") and "100,000" in c.name)
    assert sum(eight.key_lens) == 800_000 and len(set(eight.key_lens)) > 1


def test_training_is_one_rank_of_sixteen():
    cases = workloads.cases("training")
    assert len(cases) == 13 and sum(case.weight for case in cases) == 611
    assert {sum(case.query_lens) for case in cases} == {12_288}
    one_document = [c for c in cases if "pack 37" in c.name]
    pairs = {work.packed_causal_pairs(list(c.query_lens), list(c.key_lens)) for c in one_document}
    # The ranks share one document's work evenly.
    assert len(one_document) == 5
    assert max(pairs) - min(pairs) < 0.01 * max(pairs)
    assert min(pairs) == pytest.approx(196_608 * 196_609 / 2 / 16, rel=0.01)


@pytest.mark.parametrize("suite", workloads.SUITES)
def test_what_fits_is_left_as_it_is(suite):
    for case in workloads.cases(suite):
        assert case.fitted(1 << 30, 1 << 40) is case


@pytest.mark.parametrize("suite", workloads.SUITES)
def test_what_does_not_fit_is_cut_and_says_so(suite):
    for case in workloads.cases(suite):
        cut = case.fitted(500, 5_000)
        assert sum(cut.query_lens) <= 500 and sum(cut.key_lens) <= 5_000
        assert all(1 <= q <= s for q, s in zip(cut.query_lens, cut.key_lens))
        assert cut.scaled and cut.weight == case.weight


def test_requests_are_dropped_before_they_are_shortened():
    case = next(c for c in workloads.cases("decode") if c.name.startswith("128 requests"))
    mean = sum(case.key_lens) // 128
    cut = case.fitted(1 << 14, 40 * mean)
    assert 30 <= len(cut.key_lens) <= 40
    assert cut.key_lens == case.key_lens[: len(cut.key_lens)]
    assert cut.scaled == f"{len(cut.key_lens)} of 128 requests"


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match="prefill, decode, training"):
        workloads.cases("serving")
