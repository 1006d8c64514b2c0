"""Does the conversion hold up? Criteria with numbers in them, judged from the evidence alone."""

from __future__ import annotations

from dataclasses import dataclass

from openmsa.evaluation import sentences
from openmsa.evaluation.evidence import Evidence
from openmsa.evaluation.perplexity import compare
from openmsa.evaluation.retrieval import RetrievalResult, wilson

PERPLEXITY_RISE = 0.01
SOLVED, POINTS = 0.90, 0.02  # a task dense solves above the first may lose the second
BUDGETS = 8  # at contexts of at least so many budgets
SCORE_RECALL = 0.90


@dataclass(frozen=True)
class Criterion:
    """One rule, what was measured against it, and whether it holds (None: it was not measured)."""

    name: str
    rule: str
    measured: str
    holds: bool | None


def criteria(evidence: Evidence) -> list[Criterion]:
    """Every criterion, judged: perplexity, retrieval, recall, and that the control is worse."""
    return [
        _perplexity(evidence),
        _solved_by_dense(evidence),
        _retrieval(evidence),
        _recall(evidence),
        _control(evidence),
    ]


def verdict(judged: list[Criterion]) -> str:
    """One sentence: how many criteria hold, and the names of those that do not."""
    failed = [c.name for c in judged if c.holds is False]
    unknown = [c.name for c in judged if c.holds is None]
    if not failed and not unknown:
        return f"All {len(judged)} criteria hold."
    parts = [f"{len(judged) - len(failed) - len(unknown)} of {len(judged)} criteria hold"]
    parts += [f"not met: {', '.join(failed)}"] if failed else []
    parts += [f"not measured: {', '.join(unknown)}"] if unknown else []
    return "; ".join(parts) + "."


def long_cells(evidence: Evidence) -> list[tuple[str, int]]:
    """(task, context in tokens) at `BUDGETS` budgets or more that the dense model solves."""
    result = evidence.dense.retrieval
    return [cell for cell in _long(evidence) if result.rate(*cell) > SOLVED]


def pooled(result: RetrievalResult, cells: list[tuple[str, int]]) -> tuple[int, int]:
    """(right answers, questions) over some (task, context) pairs."""
    counts = [result.counts(*cell) for cell in cells]
    return sum(c for c, _ in counts), sum(n for _, n in counts)


def _perplexity(evidence: Evidence) -> Criterion:
    name, rule = "perplexity", f"at most {PERPLEXITY_RISE:.0%} above the dense model's"
    dense, converted = evidence.dense.perplexity, evidence.converted.perplexity
    if dense is None or converted is None:
        return Criterion(name, rule, "not measured", None)
    change = compare(dense, converted)
    measured = sentences.change_text(change)
    return Criterion(name, rule, measured, change.perplexity_change <= PERPLEXITY_RISE)


def _solved_by_dense(evidence: Evidence) -> Criterion:
    name = "a solved task"
    rule = (
        f"dense solves a retrieval task above {SOLVED:.0%} at {BUDGETS * evidence.budget_tokens:,} "
        f"tokens ({BUDGETS} budgets) or more"
    )
    cells = _long(evidence)
    if not cells:
        return Criterion(name, rule, "no context of that length was asked", None)
    solved = long_cells(evidence)
    tasks = sorted({task.replace("_", " ") for task, _ in solved})
    measured = f"solved: {', '.join(tasks) or 'none'}"
    return Criterion(name, rule, measured, bool(solved))


def _retrieval(evidence: Evidence) -> Criterion:
    name = "retrieval"
    rule = f"within {100 * POINTS:.0f} points of dense on every task it solves there"
    cells, converted = long_cells(evidence), evidence.converted.retrieval
    if not cells or converted is None:
        return Criterion(name, rule, "nothing to compare", None)
    losses = {c: evidence.dense.retrieval.rate(*c) - converted.rate(*c) for c in cells}
    task, tokens = worst = max(losses, key=losses.get)
    correct, total = converted.counts(*worst)
    measured = (
        f"largest loss {100 * max(losses.values()) + 0.0:.1f} points ({task.replace('_', ' ')} at "
        f"{tokens:,} tokens: {correct} of {total})"
    )
    return Criterion(name, rule, measured, max(losses.values()) <= POINTS + 1e-9)


def _recall(evidence: Evidence) -> Criterion:
    name, rule = "score recall", f"above {SCORE_RECALL:.2f}, mean over layers and groups"
    recall = evidence.converted.recall
    if recall is None:
        return Criterion(name, rule, "not measured", None)
    lowest = min(recall.layers, key=lambda layer: layer.mean("score_recall"))
    mean = recall.mean("score_recall")
    measured = f"{mean:.3f}; lowest layer {lowest.layer} with {lowest.mean('score_recall'):.3f}"
    return Criterion(name, rule, measured, mean > SCORE_RECALL)


def _control(evidence: Evidence) -> Criterion:
    """The control must lose by more than chance, or nothing was tested."""
    name, cells = "control", long_cells(evidence)
    converted, control = evidence.converted, evidence.control
    if cells and converted.retrieval is not None and control.retrieval is not None:
        rule = "answers fewer of those questions: 95% intervals apart"
        (ours, total), (theirs, _) = (pooled(m.retrieval, cells) for m in (converted, control))
        apart = wilson(theirs, total)[1] < wilson(ours, total)[0]
        return Criterion(name, rule, f"{theirs} against {ours} of {total}", apart)
    rule = "higher perplexity by more than two standard errors"
    if converted.perplexity is None or control.perplexity is None:
        return Criterion(name, rule, "not measured", None)
    change = compare(converted.perplexity, control.perplexity)
    measured = sentences.change_text(change)
    if change.mean_stderr is None:
        return Criterion(name, rule, f"{measured}, no error from one text", None)
    return Criterion(name, rule, measured, change.mean_difference > 2 * change.mean_stderr)


def _long(evidence: Evidence) -> list[tuple[str, int]]:
    result, least = evidence.dense.retrieval, BUDGETS * evidence.budget_tokens
    if result is None:
        return []
    return [(task, n) for task in result.tasks for n in result.context_tokens if n >= least]
