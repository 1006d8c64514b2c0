"""Correctness, and each operation by itself: choosing, attending, the index loss, a whole layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from openmsa.accounting import gpu, gpu_judge, gpu_rivals, inputs, rivals, work
from openmsa.accounting.inputs import DATA, Inputs
from openmsa.accounting.timing import Times
from openmsa.cli.bench_gpu_plan import (
    CHECKED,
    MISSING,
    GpuRow,
    GpuRun,
    Step,
    bytes_of,
    chosen_pairs,
    differentiated,
    reason,
)
from openmsa.cli.bench_plan import tokens_text
from openmsa.ops.index_loss import index_loss
from openmsa.selection import Selection

FP8 = torch.float8_e4m3fn


def checks(run: GpuRun) -> Iterator[Step]:
    """Every operation against fp64 before any is timed; the kernels are compiled on the way."""
    plan = run.plan
    for dtype in plan.checked:
        what = f"against fp64, {tokens_text(plan.checked_tokens)}, {inputs.name_of(dtype)}"
        need = 48 * plan.shape.r * plan.checked_tokens**2
        yield Step("check", what, 30, need, partial(_check, dtype=dtype))


def _check(run: GpuRun, dtype: torch.dtype) -> Iterator[GpuRow]:
    s = run.plan.checked_tokens
    x = run.inputs(s, s, dtype)
    words = run.words(s, s, dtype=dtype)
    selection = run.select(x)
    attend: dict[str, tuple[Selection | None, Callable[[Inputs], Tensor]]] = {
        "sparse_attention": (selection, lambda y: run.attend(y, selection)),
        "dense_attention": (None, run.dense),
    }
    found = {"select_blocks": gpu_judge.selection_verdict(x, selection)}
    for name, (chosen, call) in attend.items():
        backward, dout = differentiated(x, call)
        both = gpu_judge.whole_verdicts(x, chosen, call(x), dout, backward())
        found[f"{name} forward"], found[f"{name} backward"] = both
    step = x.last(1, s)
    chosen = run.select(step)
    verdict = gpu_judge.attention_verdict(step, chosen, run.attend(step, chosen))
    found["one decode step"] = gpu_judge.selection_verdict(step, chosen).also(verdict)
    few = x.last(min(run.plan.loss_queries, s), s)
    for name, support in (("chosen blocks", run.select(few)), ("whole prefix", None)):
        loss, gradients = _loss_with_gradients(few, support)
        verdict = gpu_judge.loss_verdict(few, support, loss, gradients)
        found[f"index_loss, {name}"] = verdict
    for what, verdict in found.items():
        yield run.untimed(what, CHECKED, shape=words, verdict=verdict, context=s)


def _loss_with_gradients(x: Inputs, selection: Selection | None, lse=None):
    leaves = [y.detach().requires_grad_() for y in (x.q_index, x.k_index)]
    loss = index_loss(x.q, x.k, *leaves, selection, lse=lse, backend="triton")
    return loss, torch.autograd.grad(loss, leaves)


def choosing(run: GpuRun) -> Iterator[Step]:
    plan, s = run.plan, run.plan.long
    for data in DATA:
        what = f"select_blocks, {tokens_text(s)}"
        need = bytes_of(plan, s, s, copies=0)
        yield Step("select", f"{what}, {data}", 8, need, partial(_choose, data=data))
    fp8 = f"select_blocks in fp8, {tokens_text(s)}"
    yield Step("select", fp8, 10, bytes_of(plan, s, s, copies=0), _choose_fp8)


def _choose(run: GpuRun, data: str) -> Iterator[GpuRow]:
    s, shape = run.plan.long, run.plan.shape
    x = _index_only(run, s, data)
    selection = run.select(x)
    yield run.row(
        f"select_blocks, {tokens_text(s)}",
        run.words(s, s),
        run.timed(lambda: run.select(x)),
        flops=work.select_flops(work.causal_pairs(s, s), shape.g, shape.d_index),
        most_ms=40,
        data=data,
        context=s,
        verdict=gpu_judge.selection_verdict(x, selection),
        peak_bytes=gpu.peak_bytes(lambda: run.select(x)),
        note=f"neighbours share {inputs.agreement(selection):.0%} of their blocks",
    )


def _choose_fp8(run: GpuRun) -> Iterator[GpuRow]:
    """Rounded to e4m3; how many choices that changes, beside the time."""
    s, shape = run.plan.long, run.plan.shape
    x = _index_only(run, s, "agreeing")
    narrow = replace(x, q_index=x.q_index.to(FP8), k_index=x.k_index.to(FP8))
    blocks, wide = run.select(narrow).blocks, run.select(x).blocks
    same = ((blocks[..., :, None] == wide[..., None, :]) & (blocks >= 0)[..., None]).any(-1)
    share = float(same.sum() / (blocks >= 0).sum())
    yield run.row(
        f"select_blocks in fp8, {tokens_text(s)}",
        run.words(s, s),
        run.timed(lambda: run.select(narrow)),
        flops=work.select_flops(work.causal_pairs(s, s), shape.g, shape.d_index),
        data="agreeing",
        context=s,
        note=f"{share:.2%} of the blocks are those of the wide index; roof: that of the wide dtype",
    )


def _index_only(run: GpuRun, s: int, data: str) -> Inputs:
    """Inputs of s tokens whose queries, keys and values are those of one."""
    plan = run.plan
    narrow = replace(plan.shape, h=plan.shape.g, d=1)
    where = {"device": gpu.device()}
    return inputs.make(narrow, s, s, plan.dtype, data, **where)


def attending(run: GpuRun) -> Iterator[Step]:
    plan, s = run.plan, run.plan.long
    need = bytes_of(plan, s, s, copies=8)
    for data in DATA:
        what = f"sparse_attention, {tokens_text(s)}, {data}"
        yield Step("attend", what, 20, need, partial(_attend, data=data))
    m = plan.middle
    what = f"dense_attention, {tokens_text(m)}"
    yield Step("attend", what, 20, bytes_of(plan, m, m, copies=8), _dense)


def _attend(run: GpuRun, data: str) -> Iterator[GpuRow]:
    s, shape = run.plan.long, run.plan.shape
    x = run.inputs(s, s, data=data)
    selection = run.select(x)
    pairs, words = chosen_pairs(shape, s, s), run.words(s, s)
    flops = work.attend_flops(pairs, shape.r, shape.d, shape.d)
    back = work.attend_backward_flops(pairs, shape.r, shape.d, shape.d)
    dense: dict[str, tuple[str, Times]] = {}
    if data == DATA[0]:
        for row, kind in dense_rivals(run, x, dense):
            yield replace(row, context=s, note=f"{row.note}; {kind}".strip("; "))
    note = _union(x, selection)
    calls = {"forward": (lambda: run.attend(x, selection), flops, 40)}
    for kind in ("forward", "backward"):
        if kind == "backward":
            call, _ = differentiated(x, lambda y: run.attend(y, selection))
            calls[kind] = (call, back, 130)
        call, amount, most = calls[kind]
        yield run.row(
            f"sparse_attention {kind}, {tokens_text(s)}",
            words,
            run.timed(call),
            flops=amount,
            most_ms=most,
            rival=dense.get(kind),
            data=data,
            context=s,
            note=note,
            peak_bytes=gpu.peak_bytes(call),
        )


def _union(x: Inputs, selection: Selection) -> str:
    """How many blocks a tile of neighbouring queries reads: what docs/triton.md estimates from."""
    from openmsa.ops import triton_launch, triton_tiles
    from openmsa.ops.gpu import gpu_of

    (t, h, d), (s, g) = x.q.shape[1:], x.k.shape[1:3]
    width = 2 * triton_tiles.padded(d)
    launch = triton_launch.for_tiles(width, x.q.element_size(), gpu_of(x.q.device))
    tokens = triton_tiles.rows_for(t, h // g, launch.rows).tokens
    places = triton_tiles.places_of(t, s, None, None, x.q.device)
    members = triton_tiles.members_of(selection.blocks, selection.block_size, places, tokens)
    return f"{float(members.count.float().mean()):.1f} blocks are read by {tokens} tokens together"


FACTORS = {"forward": 1, "backward": 2.5}


def dense_rivals(run: GpuRun, x: Inputs, best: dict[str, tuple[str, Times]], kinds=tuple(FACTORS)):
    """(row, kind) of every fused kernel of torch; puts the fastest of each kind into `best`.
    Measured are as many heads as the plan's FLOPs allow."""
    s, total = x.q.shape[1], x.q.shape[2]
    shape = run.plan.shape
    for kind in kinds:
        factor = FACTORS[kind]
        heads = rivals.heads_measured(x, s, run.plan.slice_flops, factor)
        parts = [y.requires_grad_(factor > 1) for y in gpu_rivals.heads_first(x, heads)]
        scaled = total / heads
        flops = factor * work.attend_flops(work.causal_pairs(s, s), total, shape.d, shape.d)
        for name, call in gpu_rivals.dense(*parts).items():
            what = f"dense, torch SDPA ({name}) {kind}, {tokens_text(s)}"
            try:
                if factor > 1:
                    out = call()
                    dout = torch.ones_like(out)
                    call = partial(torch.autograd.grad, out, parts, dout, retain_graph=True)
                times = run.timed(call).scaled(scaled)
            except Exception as error:  # whatever a rival does, our rows are still to come
                yield run.untimed(what, MISSING, reason(error)), kind
                continue
            if kind not in best or times.median < best[kind][1].median:
                best[kind] = f"torch SDPA ({name})", times
            note = f"measured on {heads} of {total} heads, scaled" if scaled > 1 else ""
            yield run.row(what, run.words(s, s), times, flops=flops, note=note), kind


def _dense(run: GpuRun) -> Iterator[GpuRow]:
    s, shape = run.plan.middle, run.plan.shape
    x = run.inputs(s, s)
    best: dict[str, tuple[str, Times]] = {}
    for row, _ in dense_rivals(run, x, best):
        yield replace(row, context=s)
    flops = work.attend_flops(shape.g * work.causal_pairs(s, s), shape.r, shape.d, shape.d)
    for kind, factor in FACTORS.items():
        call = partial(run.dense, x) if kind == "forward" else differentiated(x, run.dense)[0]
        yield run.row(
            f"dense_attention {kind}, {tokens_text(s)}",
            run.words(s, s),
            run.timed(call),
            flops=factor * flops,
            rival=best.get(kind),
            context=s,
            peak_bytes=gpu.peak_bytes(call),
        )


def losses(run: GpuRun) -> Iterator[Step]:
    plan = run.plan
    for s, whole in ((plan.long, False), (plan.middle, True)):
        what = f"index_loss, {'whole prefix' if whole else 'chosen blocks'}, {tokens_text(s)}"
        need = bytes_of(plan, s, s, copies=2)
        yield Step("loss", what, 15, need, partial(_loss, what=what, s=s, whole=whole))


def _loss(run: GpuRun, what: str, s: int, whole: bool) -> Iterable[GpuRow]:
    """Value and gradients, from the lse of the attention."""
    from openmsa.ops.dense_attention import dense_attention
    from openmsa.ops.sparse_attention import sparse_attention

    shape, x = run.plan.shape, run.inputs(s, s)
    selection = None if whole else run.select(x)
    pairs = shape.g * work.causal_pairs(s, s) if whole else chosen_pairs(shape, s, s)
    how = {"return_lse": True, "backend": "triton"}
    if whole:
        lse = dense_attention(x.q, x.k, x.v, **how)[1]
    else:
        lse = sparse_attention(x.q, x.k, x.v, selection, **how)[1]
    call = partial(_loss_with_gradients, x, selection, lse)
    yield run.row(
        f"{what}: value and gradients",
        run.words(s, s),
        run.timed(call),
        flops=work.index_loss_flops(pairs, shape.r, shape.d, shape.d_index),
        context=s,
        data="agreeing",
        peak_bytes=gpu.peak_bytes(call),
    )
