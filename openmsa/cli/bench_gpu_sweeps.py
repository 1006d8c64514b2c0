"""Time against context: whole prefills, and one decode step of small and large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from openmsa.accounting import gpu, gpu_rivals, work
from openmsa.accounting.inputs import Inputs
from openmsa.accounting.timing import Times
from openmsa.cli.bench_gpu_parts import dense_rivals
from openmsa.cli.bench_gpu_plan import (
    MISSING,
    GpuRow,
    GpuRun,
    Step,
    bytes_of,
    chosen_pairs,
    msa_flops,
    reason,
)
from openmsa.cli.bench_plan import tokens_text

PREFILL, DECODE = "prefill", "one decode step"
MSA, DENSE = "MSA", "dense"
WITH_HOST = "with the host's launches"


def prefills(run: GpuRun) -> Iterator[Step]:
    plan = run.plan
    for s in plan.prefill:
        seconds = 8 + 12 * s / (1 << 20)
        need = bytes_of(plan, s, s, copies=1.5)
        yield Step(PREFILL, f"{PREFILL}, {tokens_text(s)}", seconds, need, partial(_prefill, s=s))


def _prefill(run: GpuRun, s: int) -> Iterator[GpuRow]:
    """Choosing and attending, against dense attention of the same queries."""
    shape, words = run.plan.shape, run.words(s, s)
    x = run.inputs(s, s)
    call = partial(run.msa, x)
    times, peak = run.timed(call), gpu.peak_bytes(call)
    best: dict[str, tuple[str, Times]] = {}
    for row, _ in dense_rivals(run, x, best, kinds=("forward",)):
        yield replace(row, context=s)
    if "forward" in best:
        name, dense = best["forward"]
        flops = work.attend_flops(work.causal_pairs(s, s), shape.h, shape.d, shape.d)
        more = {"context": s, "note": name}
        yield run.row(f"{PREFILL}, {DENSE}, {tokens_text(s)}", words, dense, flops=flops, **more)
    yield run.row(
        f"{PREFILL}, {MSA}, {tokens_text(s)}",
        words,
        times,
        flops=msa_flops(shape, s, s),
        rival=best.get("forward"),
        least_ratio=14.2 if s == 1 << 20 else None,
        data="agreeing",
        context=s,
        peak_bytes=peak,
    )


def decodes(run: GpuRun) -> Iterator[Step]:
    plan = run.plan
    for batch in plan.batches:
        for s in plan.decode:
            what = f"{DECODE}, {tokens_text(s)}, batch {batch}"
            need = bytes_of(plan, 1, s, batch)
            yield Step("decode", what, 7, need, partial(_decode, s=s, batch=batch))


def _decode(run: GpuRun, s: int, batch: int) -> Iterator[GpuRow]:
    """As a CUDA graph, which is how servers decode; and once with the host's launches."""
    shape, words = run.plan.shape, run.words(1, s, batch)
    x = run.inputs(1, s, batch=batch)
    size = run.plan.dtype.itemsize
    how = {"d": shape.d, "d_value": shape.d, "element_bytes": size}
    pairs = chosen_pairs(shape, 1, s)
    ours = batch * work.decode_bytes(s, pairs, d_index=shape.d_index, **how)
    theirs = batch * work.dense_decode_bytes(s, shape.g, **how)
    more = {"context": s, "batch": batch}
    best: tuple[str, Times] | None = None
    for name, call in gpu_rivals.dense_decoding(x).items():
        what = f"{DECODE}, torch SDPA ({name}), {tokens_text(s)}"
        try:
            times, note = _replayed(run, call)
        except Exception as error:  # whatever a rival does, our rows are still to come
            yield run.untimed(what, MISSING, reason(error), shape=words, **more)
            continue
        if best is None or times.median < best[1].median:
            best = f"torch SDPA ({name})", times
        yield run.row(what, words, times, num_bytes=theirs, note=note, **more)
    if best:
        name, times = best
        what = f"{DECODE}, {DENSE}, {tokens_text(s)}"
        yield run.row(what, words, times, num_bytes=theirs, note=name, **more)
    yield from _ours(run, x, words, best, num_bytes=ours, **more)


def _ours(run: GpuRun, x: Inputs, words: str, best, **more) -> Iterator[GpuRow]:
    call = partial(run.msa, x)
    first = more["batch"] == 1 and more["context"] == 1 << 20
    plain = run.timed(call)
    tokens = tokens_text(more["context"])
    yield run.row(f"{DECODE}, MSA {WITH_HOST}, {tokens}", words, plain, **more)
    times, note = _replayed(run, call)
    peak = gpu.peak_bytes(call)
    yield run.row(
        f"{DECODE}, {MSA}, {tokens}",
        words,
        times,
        rival=best,
        least_ratio=7.6 if first else None,
        note=note,
        peak_bytes=peak,
        **more,
    )


def _replayed(run: GpuRun, call: Callable) -> tuple[Times, str]:
    """(times as a CUDA graph, "in a CUDA graph"); without one where Triton is interpreted."""
    if gpu.device().type == "cpu":
        return run.timed(call), WITH_HOST
    return run.timed(gpu.graphed(call)), "in a CUDA graph"
