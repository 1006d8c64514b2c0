"""Verdicts come from the numbers: each criterion can fail, and can be unmeasured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openmsa.evaluation.criteria import criteria, verdict
from openmsa.evaluation.evidence import ModelEvidence
from tests.evaluation.made_up import answers, evidence, losses, recall


def holds(of) -> dict[str, bool | None]:
    return {criterion.name: criterion.holds for criterion in criteria(of)}


def test_a_good_conversion_meets_them_all():
    good = evidence()
    assert set(holds(good).values()) == {True}
    assert verdict(criteria(good)) == "All 5 criteria hold."


GOOD = evidence()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("perplexity", {"converted": replace(GOOD.converted, perplexity=losses(0.02))}),
        ("retrieval", {"converted": replace(GOOD.converted, retrieval=answers(1.0, 0.9))}),
        ("score recall", {"converted": replace(GOOD.converted, recall=recall(0.9))}),
        ("control", {"control": replace(GOOD.control, retrieval=answers(1.0))}),
    ],
)
def test_each_can_fail_alone(name, bad):
    judged = holds(evidence(**bad))
    assert judged.pop(name) is False and set(judged.values()) == {True}
    assert verdict(criteria(evidence(**bad))) == f"4 of 5 criteria hold; not met: {name}."


def test_a_loss_at_short_contexts_is_not_what_is_judged():
    short = replace(GOOD.converted, retrieval=answers(0.5, 1.0))
    assert holds(evidence(converted=short))["retrieval"] is True


def test_tasks_that_dense_does_not_solve_show_nothing():
    unsolved = evidence(dense=replace(GOOD.dense, retrieval=answers(1.0, 0.8)))
    judged = holds(unsolved)
    assert judged["a solved task"] is False and judged["retrieval"] is None
    told = verdict(criteria(unsolved))
    assert "not met: a solved task" in told and "not measured: retrieval" in told


def test_a_context_below_eight_budgets_does_not_count():
    judged = holds(evidence(top_k=16))
    assert judged["a solved task"] is None and judged["retrieval"] is None


def test_the_control_is_judged_by_perplexity_where_nothing_was_asked():
    without = {
        name: replace(getattr(GOOD, name), retrieval=None)
        for name in ("dense", "converted", "control")
    }
    assert holds(evidence(**without))["control"] is True
    equal = {**without, "control": replace(without["control"], perplexity=losses(0.004))}
    assert holds(evidence(**equal))["control"] is False


def test_nothing_measured_is_nothing_claimed():
    bare = evidence(dense=ModelEvidence(), converted=ModelEvidence(), control=ModelEvidence())
    assert set(holds(bare).values()) == {None}
    assert verdict(criteria(bare)).startswith("0 of 5 criteria hold; not measured:")
