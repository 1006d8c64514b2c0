"""The workloads suite: shapes that real systems have seen, on one layer, each held against the time
that the machine would need at least: its FLOPs at the speed of torch's matmul, or its bytes at the
speed of reading, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from openmsa.accounting import inputs, judge, machine, roofs, work, workloads
from openmsa.accounting.inputs import Inputs
from openmsa.accounting.timing import Times, timed
from openmsa.accounting.workloads import Case
from openmsa.cli.bench_plan import Row, Run
from openmsa.selection import Selection

BF16 = torch.bfloat16
MOST_QUERIES = 1 << 14


def measured(run: Run) -> Iterator[Row]:
    """A row per case, and one per suite for its weighted mean."""
    pool = _pool(run)
    reading = roofs.read(run.plan.read_bytes)
    for suite in workloads.SUITES:
        rows = []
        cases = workloads.cases(suite)
        for case in cases if run.plan.with_targets else cases[:2]:
            fitting = case.fitted(pool.q.shape[1], pool.k.shape[1])
            rows.append((case.weight, _one(run, fitting, pool, reading)))
            yield rows[-1][1]
        yield _mean(suite, rows)


def _pool(run: Run) -> Inputs:
    """Tensors that every case takes its part of; gradients must fit beside them."""
    shape, plan = run.plan.shape, run.plan
    free = machine.available_bytes() or 8 << 30
    # Keys, values and their gradients, each with an fp32 sum beside it, and the index keys.
    a_key = 2 * shape.d_index + 4 * shape.g * shape.d * (2 + 4 if plan.with_targets else 1)
    keys = min(3 * plan.most_tokens, free // 2 // a_key)
    queries = min(MOST_QUERIES, plan.most_tokens // 2)
    return inputs.make(shape, queries, max(keys, queries), BF16, "agreeing")


def _one(run: Run, case: Case, pool: Inputs, reading) -> Row:
    shape, seconds = run.plan.shape, run.plan.seconds / 4
    x = pool.last(sum(case.query_lens), sum(case.key_lens))
    packed = {"cu_seqlens_q": _borders(case.query_lens), "cu_seqlens_k": _borders(case.key_lens)}
    selection = run.select(x, **packed)
    pairs = work.selected_pairs(selection, x.k.shape[1], **packed)
    causal = work.packed_causal_pairs(case.query_lens, case.key_lens)
    flops = work.select_flops(causal, shape.g, shape.d_index)
    flops += work.attend_flops(pairs, shape.r, shape.d, shape.d)
    if case.suite == "training":
        flops += work.attend_backward_flops(pairs, shape.r, shape.d, shape.d)
    call = (
        _training_step(run, x, packed) if case.suite == "training" else lambda: run.msa(x, **packed)
    )
    times, product = roofs.beside(run.matmul(BF16), lambda: timed(call, seconds=seconds))
    rate = roofs.matmul_flops(run.plan.matmul_size) / product
    least = flops / rate
    num_bytes = 2 * (sum(case.key_lens) * shape.d_index + 2 * x.q.numel())
    if case.suite == "decode":
        least = max(least, num_bytes * reading().median / run.plan.read_bytes)
    return Row(
        f"{case.suite}: {case.name}",
        shape.words(x.q.shape[1], x.k.shape[1], BF16),
        "forward and backward" if case.suite == "training" else "select + attend",
        "ms",
        tuple(1e3 * times.quantile(share) for share in (0.2, 0.5, 0.8)),
        data="agreeing",
        rival="floor, at the speed of matmul or read",
        rival_value=1e3 * least,
        ratio=least / times.median,
        verdict=_verdict(run, case, x, selection, packed),
        note=case.scaled,
        repeats=len(times.seconds),
    )


def _training_step(run: Run, x: Inputs, packed: dict):
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    dout = inputs.normal(*x.q.shape, dtype=x.q.dtype, seed=7)

    def step() -> None:
        out = run.msa(Inputs(*leaves, x.q_index, x.k_index), **packed)
        torch.autograd.grad(out, leaves, dout)

    return step


def _verdict(run: Run, case: Case, x: Inputs, selection: Selection, packed: dict) -> judge.Verdict:
    """The last sequence by itself: its queries and keys are the last ones of the pack."""
    t, s = case.query_lens[-1], case.key_lens[-1]
    alone = Inputs(x.q[:, -t:], x.k[:, -s:], x.v[:, -s:], x.q_index[:, -t:], x.k_index[:, -s:])
    own = Selection(selection.blocks[:, :, -t:], selection.block_size)
    tokens = judge.sampled(t, 2)
    out = run.attend(x, selection, **packed)[:, -t:]
    verdict = judge.judge_selection(alone, own, tokens)
    return verdict.also(judge.judge_attention(alone, own, out, tokens))


def _mean(suite: str, rows: list[tuple[int, Row]]) -> Row:
    """Weighted as the source weighs its cases."""
    total = sum(weight for weight, _ in rows)
    mean = sum(weight * row.ours[1] for weight, row in rows) / total
    least = sum(weight * row.rival_value for weight, row in rows) / total
    return Row(
        f"{suite}: weighted mean of {len(rows)} cases",
        rows[0][1].shape.partition(", ")[2],
        rows[0][1].metric,
        "ms",
        Times((mean,)).seconds * 3,
        data="agreeing",
        rival=rows[0][1].rival,
        rival_value=least,
        ratio=least / mean,
        note=f"{sum(bool(row.note) for _, row in rows)} cases scaled down",
    )


def _borders(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
