"""One sentence per picture, made from the numbers: what is seen, never what was hoped for."""

from __future__ import annotations

from openmsa.evaluation.evidence import Evidence, ModelEvidence
from openmsa.evaluation.figures import tokens_text
from openmsa.evaluation.inspection import Bearing, SelectionMap
from openmsa.evaluation.perplexity import PairedDifference, compare

NOT_MEASURED = "Not measured in this run."


def perplexity(evidence: Evidence) -> str:
    """How far the converted model and the control are from dense."""
    dense = evidence.dense.perplexity
    if dense is None:
        return NOT_MEASURED
    tokens, texts = sum(dense.num_tokens), len(dense.loss_sums)
    told = [f"Over {tokens:,} tokens of {texts} texts, dense has {dense.mean_perplexity:.3f}"]
    for name, model in list(evidence.models.items())[1:]:
        if model.perplexity is not None:
            told.append(f"{name} {change_text(compare(dense, model.perplexity))}")
    return "; ".join(told) + ". Errors are over texts, paired."


def change_text(change: PairedDifference) -> str:
    """A change of perplexity with its standard error: "+0.42% ± 0.10%"."""
    error = change.perplexity_change_stderr
    spread = "" if error is None else f" ± {error:.2%}"
    return f"{change.perplexity_change:+.2%}{spread}"


def retrieval(evidence: Evidence) -> str:
    """Right answers at the longest context, and how many budgets that is."""
    asked = {n: m.retrieval for n, m in evidence.models.items() if m.retrieval is not None}
    if not asked:
        return NOT_MEASURED
    longest = max(next(iter(asked.values())).context_tokens)
    parts = []
    for name, result in asked.items():
        counts = [result.counts(task, longest) for task in result.tasks]
        parts.append(f"{name} {sum(c for c, _ in counts)} of {sum(n for _, n in counts)}")
    budgets = longest / evidence.budget_tokens
    return (
        f"At {longest:,} tokens, {budgets:g} times the {evidence.budget_tokens} tokens that a "
        f"query may read, answered right over all tasks: {', '.join(parts)}."
    )


def recall(evidence: Evidence) -> str:
    """Score recall and captured mass of the converted model and the control."""
    parts = []
    for name, model in evidence.models.items():
        if model.recall is not None:
            score, mass, best = (
                model.recall.mean(m) for m in ("score_recall", "captured_mass", "oracle_mass")
            )
            parts.append(
                f"{name}: the index finds {score:.1%} of the mass of the best blocks and so "
                f"{mass:.1%} of all attention (best possible {best:.1%})"
            )
    return "; ".join(parts) + "." if parts else NOT_MEASURED


def training(evidence: Evidence) -> str:
    """From what to what the losses went."""
    losses = [r.get("lm_loss", r.get("loss")) for r in evidence.training]
    losses = [loss for loss in losses if loss is not None]
    if not losses:
        return NOT_MEASURED
    told = (
        f"Over {evidence.training[-1]['tokens']:,} tokens the loss of the language model went from "
        f"{losses[0]:.3f} to {losses[-1]:.3f} nats"
    )
    totals = [t for t in (_total_kl(record) for record in evidence.training) if t is not None]
    if totals:
        told += f", the KL summed over layers from {totals[0]:.3f} to {totals[-1]:.3f}"
    return (
        told
        + "; first and last logged values. The KL of a sparse phase is over selected keys only."
    )


def selection(maps: SelectionMap | None) -> str:
    """How much the index selects the first block and the neighbour, against even choice."""
    if maps is None:
        return NOT_MEASURED
    first, before = [], []
    for layer in maps.probability:
        for group in layer:
            skip = maps.top_k // maps.blocks_per_cell + 1  # below, every block is selected
            first += [row[0] for row in group[skip:] if row[0] is not None]
            before += [row[n - 1] for n, row in enumerate(group) if n >= skip]
    if not first:
        return "The text is too short for the index to leave anything out."
    width = "block" if maps.blocks_per_cell == 1 else f"cell of {maps.blocks_per_cell} blocks"
    return (
        f"Where not every block fits, the first {width} is selected by {_mean(first):.0%} of "
        f"queries and the {width} before the query's own by {_mean(before):.0%}, averaged over "
        f"{len(maps.layers)} layers and their groups; the own block is always selected."
    )


def decoding(evidence: Evidence) -> str:
    """Time of a token at the longest context both were measured at."""
    dense, converted = _times(evidence.dense), _times(evidence.converted)
    shared = sorted(set(dense) & set(converted))
    if not shared:
        return NOT_MEASURED
    longest = shared[-1]
    slow, fast = dense[longest], converted[longest]
    how = "as fast as" if slow >= fast else "the speed of"
    told = (
        f"At {tokens_text(longest)} tokens of context, a token takes {slow:.2f} ms dense and "
        f"{fast:.2f} ms converted: {slow / fast:.2f} times {how} dense"
    )
    slower = [n for n in shared if converted[n] >= dense[n]]
    if longest in slower:
        return told + "; converted is not faster at that length."
    faster = [n for n in shared if not slower or n > slower[-1]]
    return told + f"; converted is the faster one from {tokens_text(faster[0])} tokens on."


def bearing(judged: Bearing | None) -> str:
    """Which layers would bear the budget, by the rule."""
    if judged is None:
        return NOT_MEASURED
    kept = ", ".join(map(str, judged.keep_dense)) or "none"
    return (
        f"Judged on the dense model before any training, over {judged.queries:,} queries: layers "
        f'"keep dense" where even the best {judged.top_k} blocks of {judged.block_size} tokens '
        "hold "
        f'less than {judged.threshold:.0%} of the attention, "train" where they hold more but the '
        f'derived index does not find it, else "ready". To keep dense: {kept}.'
    )


def _total_kl(record: dict) -> float | None:
    parts = [value for key, value in record.items() if key.startswith("kl/")]
    return sum(parts) if parts else None


def _times(model: ModelEvidence) -> dict[int, float]:
    return {time.context_tokens: time.median_ms for time in model.decode}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
