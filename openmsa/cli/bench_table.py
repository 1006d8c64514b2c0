"""The table of `openmsa bench cpu`: what was promised (docs/design.md), measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from openmsa.accounting import inputs, judge, m3, machine, rivals, roofs, work
from openmsa.accounting.inputs import DATA, Inputs
from openmsa.accounting.timing import timed
from openmsa.cli.bench_plan import Row, Run, tokens_text
from openmsa.cli.bench_sweep import crossing
from openmsa.selection import Selection

BF16, FP32 = torch.bfloat16, torch.float32
SLACK = 1.25


def parts(run: Run) -> dict[str, tuple[int, Callable[[Run], Iterator[Row]]]]:
    """{part of the table: (its longest context in tokens, what measures it)}"""
    plan = run.plan
    return {
        "choosing, and both steps behind a long prefix": (plan.select_keys, _chunk),
        "sparse attention, forward and backward": (plan.prefill, _prefill),
        "dense attention, forward and backward": (plan.dense, _dense),
        "one decode step": (plan.decode, _decode),
        "transformers' MiniMax-M3": (plan.m3, _m3),
        "fp32": (plan.fp32, _fp32),
        "where MSA overtakes dense attention": (max(plan.crossing), crossing),
    }


def left_out(run: Run, tokens: int, measure: Callable) -> str:
    """Why a part with this context cannot be measured here; empty if it can."""
    if tokens > run.plan.context[1]:
        return f"--context ends at {tokens_text(run.plan.context[1])}"
    shape = run.plan.shape
    queries = min(tokens, run.plan.prefill) if tokens < run.plan.select_keys else run.plan.chunk
    need = 2 * (tokens * (2 * shape.g * shape.d + shape.d_index) + 6 * queries * shape.h * shape.d)
    need = SLACK * (need + run.plan.read_bytes)
    free = machine.available_bytes()
    if measure is _m3:
        if why := m3.missing():
            return why
        need = 0 if m3.groups_that_fit(shape, tokens, free) else m3.group_bytes(shape, tokens)
    if free is not None and need > free:
        return f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return ""


def _chunk(run: Run) -> Iterator[Row]:
    plan, t, s = run.plan, run.plan.chunk, run.plan.select_keys
    words, where = plan.shape.words(t, s, BF16), f"last {t:,} of {tokens_text(s)}"
    flops = work.select_flops(work.causal_pairs(t, s), plan.shape.g, plan.shape.d_index)
    rival = None
    for data in DATA:
        x = run.inputs(t, s, BF16, data)
        rival = rival or rivals.prefill(x, seconds=plan.seconds, flops=plan.slice_flops)
        selection = run.select(x)
        verdict = judge.judge_selection(x, selection, judge.sampled(t))
        yield run.against_matmul(
            f"select_blocks, {where}",
            words,
            flops,
            lambda x=x: timed(lambda: run.select(x), seconds=plan.seconds),
            dtype=BF16,
            target=0.75,
            data=data,
            verdict=verdict,
            note=_agreement(selection),
        )
        times = timed(lambda x=x: run.msa(x), seconds=plan.seconds)
        out = run.attend(x, selection)
        verdict = verdict.also(judge.judge_attention(x, selection, out, judge.sampled(t)))
        yield run.faster(
            f"select + attend, {where}",
            words,
            times,
            rival.times,
            rival.words,
            40,
            data=data,
            verdict=verdict,
            note="SDPA: prefix without mask + causal rest",
        )


def _prefill(run: Run) -> Iterator[Row]:
    plan, s = run.plan, run.plan.prefill
    words = plan.shape.words(s, s, BF16)
    rival = None
    for data in DATA:
        x = run.inputs(s, s, BF16, data)
        rival = rival or rivals.prefill(x, seconds=plan.seconds, flops=plan.slice_flops)
        selection = run.select(x)
        choosing = timed(lambda x=x: run.select(x), seconds=plan.seconds)
        measured = []
        yield _forward(run, x, selection, words, 0.60, data, measured)
        yield run.faster(
            f"select + attend, {tokens_text(s)}",
            words,
            choosing.plus(measured[0]),
            rival.times,
            rival.words,
            15,
            data=data,
            verdict=judge.judge_selection(x, selection, judge.sampled(s)),
        )
        yield _backward(run, x, selection, words, data)


def _forward(run: Run, x: Inputs, selection: Selection, words, target, data, measured) -> Row:
    """The row of sparse attention; its times are put into `measured` for whoever adds them up."""
    shape, s = run.plan.shape, x.k.shape[1]
    flops = work.attend_flops(work.selected_pairs(selection, s), shape.r, shape.d, shape.d)
    out = []

    def attend() -> None:
        out[:] = [run.attend(x, selection)]

    def measure():
        measured.append(timed(attend, seconds=3 * run.plan.seconds))
        return measured[-1]

    row = run.against_matmul(
        f"sparse_attention forward, {tokens_text(s)}",
        words,
        flops,
        measure,
        dtype=x.q.dtype,
        target=target,
        data=data,
        note=_agreement(selection),
    )
    verdict = judge.judge_attention(x, selection, out[0], judge.sampled(x.q.shape[1]))
    return replace(row, verdict=verdict)


def _backward(run: Run, x: Inputs, selection: Selection, words: str, data: str) -> Row:
    shape, s = run.plan.shape, x.k.shape[1]
    flops = work.attend_backward_flops(work.selected_pairs(selection, s), shape.r, shape.d, shape.d)
    gradients, measure, dout = _differentiated(run, x, lambda y: run.attend(y, selection))
    row = run.against_matmul(
        f"sparse_attention backward, {tokens_text(s)}",
        words,
        flops,
        measure,
        dtype=BF16,
        target=0.45,
        data=data,
    )
    return replace(row, verdict=judge.judge_gradients(x, selection, dout, gradients))


def _differentiated(run: Run, x: Inputs, attend: Callable[[Inputs], torch.Tensor]):
    """(list that will hold dq, dk, dv, what times the backward pass, the gradient it starts at)"""
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    out = attend(Inputs(*leaves, x.q_index, x.k_index))
    dout = inputs.normal(*out.shape, dtype=out.dtype, seed=7)
    gradients: list[torch.Tensor] = []

    def differentiate() -> None:
        gradients[:] = torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return gradients, lambda: timed(differentiate, seconds=3 * run.plan.seconds), dout


def _dense(run: Run) -> Iterator[Row]:
    plan, s = run.plan, run.plan.dense
    words = plan.shape.words(s, s, BF16)
    x = run.inputs(s, s, BF16)
    times = timed(lambda: run.dense(x), seconds=plan.seconds)
    rival = rivals.prefill(x, seconds=plan.seconds, flops=plan.slice_flops)
    yield run.faster(
        f"dense_attention forward, {tokens_text(s)}",
        words,
        times,
        rival.times,
        rival.words,
        3,
        verdict=judge.judge_attention(x, None, run.dense(x), judge.sampled(s)),
    )
    gradients, measure, dout = _differentiated(run, x, run.dense)
    times = measure()
    rival = rivals.backward(x, dout, seconds=plan.seconds, flops=plan.slice_flops)
    yield run.faster(
        f"dense_attention backward, {tokens_text(s)}",
        words,
        times,
        rival.times,
        rival.words,
        2,
        verdict=judge.judge_gradients(x, None, dout, gradients),
    )


def _decode(run: Run) -> Iterator[Row]:
    plan, shape, s = run.plan, run.plan.shape, run.plan.decode
    x = run.inputs(1, s, BF16)
    selection = run.select(x)
    num_bytes = work.decode_bytes(
        s,
        work.selected_pairs(selection, s),
        d_index=shape.d_index,
        d=shape.d,
        d_value=shape.d,
        element_bytes=2,
    )
    verdict = judge.judge_selection(x, selection, [0])
    verdict = verdict.also(judge.judge_attention(x, selection, run.attend(x, selection), [0]))
    times, roof = roofs.beside(
        roofs.read(plan.read_bytes), lambda: timed(lambda: run.msa(x), seconds=plan.seconds / 2)
    )
    yield run.rated(
        f"one decode step, {tokens_text(s)} keys",
        shape.words(1, s, BF16),
        "GB/s",
        num_bytes / 1e9,
        times,
        f"torch.sum, {plan.read_bytes / 1e9:.2g} GB",
        plan.read_bytes / roof / 1e9,
        0.70,
        verdict=verdict,
        note=f"{1e3 * times.median:.2f} ms",
    )


def _m3(run: Run) -> Iterator[Row]:
    plan, s = run.plan, run.plan.m3
    groups = m3.groups_that_fit(plan.shape, s, machine.available_bytes())
    what = f"M3 attention, one layer, {tokens_text(s)}"
    found = m3.compare(
        plan.shape,
        s,
        groups,
        seconds=plan.seconds,
        backend=run.backend,
        instruction_set=run.instruction_set,
    )
    theirs, ours = found.theirs, found.ours
    note = f"both on {groups} of {plan.shape.g} groups" if groups < plan.shape.g else ""
    words = plan.shape.words(s, s, BF16)
    more = {"verdict": found.verdict, "note": note}
    name = "transformers, MiniMaxM3VLAttention with sdpa"
    yield run.faster(f"{what}: time", words, ours.times, theirs.times, name, 20, **more)
    ratio = theirs.peak_bytes / max(1, ours.peak_bytes)
    goal = {"target": "10", "met": ratio >= 10} if plan.with_targets else {}
    yield Row(
        f"{what}: memory",
        words,
        "peak above inputs",
        "GB",
        (ours.peak_bytes / 1e9,) * 3,
        rival=name,
        rival_value=theirs.peak_bytes / 1e9,
        ratio=ratio,
        repeats=1,
        **goal,
        **more,
    )


def _fp32(run: Run) -> Iterator[Row]:
    s = run.plan.fp32
    x = run.inputs(s, s, FP32)
    words = run.plan.shape.words(s, s, FP32)
    yield _forward(run, x, run.select(x), words, 0.60, "random", [])


def _agreement(selection: Selection) -> str:
    return f"neighbours share {inputs.agreement(selection):.0%} of their blocks"
