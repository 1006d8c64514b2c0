"""A whole layer with its projections, shapes that real systems have seen, and other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from openmsa.accounting import gpu, gpu_judge, gpu_rivals, inputs, work, workloads
from openmsa.accounting.inputs import Inputs
from openmsa.accounting.timing import Times
from openmsa.accounting.workloads import Case
from openmsa.cli.bench_gpu_plan import MISSING, GpuRow, GpuRun, Step, bytes_of, reason
from openmsa.cli.bench_plan import tokens_text
from openmsa.mechanisms.msa import msa_attention
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.selection import Selection

KINDS = {"forward": False, "forward and backward": True}


def layers(run: GpuRun) -> Iterator[Step]:
    plan, s = run.plan, run.plan.middle
    need = bytes_of(plan, s, s, copies=12)
    yield Step("layer", f"one layer, {tokens_text(s)}", 25, need, _layer)


@dataclass(frozen=True)
class _Projections:
    """Weights of a layer: hidden -> q, k, v, q_index, k_index, and back."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_index: Tensor
    k_index: Tensor
    back: Tensor

    def main(self, hidden: Tensor, d: int) -> Iterator[Tensor]:
        return ((hidden @ x).unflatten(-1, (-1, d)) for x in (self.q, self.k, self.v))

    def index(self, hidden: Tensor, d_index: int) -> tuple[Tensor, Tensor]:
        q_index = (hidden.detach() @ self.q_index).unflatten(-1, (-1, d_index))
        return q_index, hidden.detach() @ self.k_index


def _projections(run: GpuRun) -> _Projections:
    shape, hidden = run.plan.shape, run.plan.hidden
    widths = (shape.h * shape.d, shape.g * shape.d, shape.g * shape.d)
    widths += (shape.g * shape.d_index, shape.d_index)
    where = {"dtype": run.plan.dtype, "device": gpu.device()}
    made = [inputs.normal(hidden, width, seed=n, **where) for n, width in enumerate(widths, 20)]
    made.append(inputs.normal(widths[0], hidden, seed=30, **where))
    return _Projections(*(weight * hidden**-0.5 for weight in made))


def _layer(run: GpuRun) -> Iterator[GpuRow]:
    """Projections, attention and, in training, the index loss; without norms and rotary."""
    s, shape = run.plan.middle, run.plan.shape
    weights = _projections(run)
    where = {"dtype": run.plan.dtype, "device": gpu.device()}
    hidden = inputs.normal(1, s, run.plan.hidden, seed=9, **where)
    budget = {"block_size": shape.block_size, "top_k": shape.top_k, "backend": "triton"}

    def msa(train: bool) -> tuple[Tensor, ...]:
        index = weights.index(hidden, shape.d_index)
        made = msa_attention(
            *weights.main(hidden, shape.d), *index, with_index_loss=train, **budget
        )
        return (made.out.flatten(2) @ weights.back, *([made.index_loss] if train else []))

    def dense(name: str, train: bool) -> tuple[Tensor, ...]:
        parts = (part.transpose(1, 2) for part in weights.main(hidden, shape.d))
        out = gpu_rivals.dense(*parts)[name]()
        return (out.transpose(1, 2).flatten(2) @ weights.back,)

    leaves = (hidden, *vars(weights).values())
    for kind, train in KINDS.items():
        what, words = f"one layer, {kind}, {tokens_text(s)}", run.words(s, s)
        best: tuple[str, Times] | None = None
        for name in gpu_rivals.FUSED:
            try:
                times = run.timed(_pass(partial(dense, name, train), leaves, train))
            except Exception as error:  # whatever a rival does, our row is still to come
                yield run.untimed(f"{what}: dense, torch SDPA ({name})", MISSING, reason(error))
                continue
            if best is None or times.median < best[1].median:
                best = f"dense, torch SDPA ({name})", times
        call = _pass(partial(msa, train), leaves, train)
        times, peak = run.timed(call), gpu.peak_bytes(call)
        more = {"context": s, "peak_bytes": peak, "note": f"hidden {run.plan.hidden}"}
        yield run.row(what, words, times, rival=best, **more)


def _pass(call: Callable[[], tuple[Tensor, ...]], leaves, train: bool) -> Callable[[], object]:
    """Forward alone, or with the gradients of all leaves that have one."""
    for leaf in leaves:
        leaf.requires_grad_(train)

    def run():
        with torch.set_grad_enabled(train):
            found = call()
        if not train:
            return found[0]
        seeds = [torch.ones_like(y) for y in found]
        return torch.autograd.grad(found, leaves, seeds, allow_unused=True)

    return run


def cases(run: GpuRun) -> Iterator[Step]:
    """The heaviest cases of each suite of shared shapes."""
    plan = run.plan
    for suite in workloads.SUITES:
        for case in workloads.cases(suite)[: plan.cases]:
            case = case.fitted(plan.most_queries, 3 * max(plan.decode))
            need = bytes_of(plan, sum(case.query_lens), sum(case.key_lens), copies=4)
            what = f"{suite}: {case.name}"
            yield Step("workloads", what, 4, need, partial(_case, case=case))


def _case(run: GpuRun, case: Case) -> Iterator[GpuRow]:
    shape, (t, s) = run.plan.shape, (sum(case.query_lens), sum(case.key_lens))
    x = run.inputs(t, max(s, t))
    packed = {"cu_seqlens_q": _borders(case.query_lens), "cu_seqlens_k": _borders(case.key_lens)}
    selection = run.select(x, **packed)
    here = Selection(selection.blocks.cpu(), selection.block_size)
    on_cpu = {name: borders.cpu() for name, borders in packed.items()}
    pairs = work.selected_pairs(here, x.k.shape[1], **on_cpu)
    causal = work.packed_causal_pairs(case.query_lens, case.key_lens)
    flops = work.select_flops(causal, shape.g, shape.d_index)
    flops += work.attend_flops(pairs, shape.r, shape.d, shape.d)
    size = run.plan.dtype.itemsize
    num_bytes = size * (s * shape.d_index + 2 * x.q.numel())
    call, kind = partial(run.msa, x, **packed), "select + attend"
    if case.suite == "training":
        flops += work.attend_backward_flops(pairs, shape.r, shape.d, shape.d)
        call, kind = _training(run, x, packed), "forward and backward"
    last, keys = case.query_lens[-1], case.key_lens[-1]
    alone = Inputs(
        *(y[:, -n:] for y, n in zip(vars(x).values(), (last, keys, keys, last, keys), strict=True))
    )
    own = Selection(selection.blocks[:, :, -last:], selection.block_size)
    out = run.attend(x, selection, **packed)[:, -last:]
    yield run.row(
        f"{case.suite}: {case.name}, {kind}",
        run.words(t, s),
        run.timed(call),
        flops=flops,
        num_bytes=num_bytes,
        data="agreeing",
        note=case.scaled,
        verdict=gpu_judge.attention_verdict(alone, own, out),
    )


def _training(run: GpuRun, x: Inputs, packed: dict) -> Callable[[], object]:
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    dout = torch.ones_like(x.q)

    def step():
        out = run.msa(Inputs(*leaves, x.q_index, x.k_index), **packed)
        return torch.autograd.grad(out, leaves, dout)

    return step


def _borders(lengths: tuple[int, ...]) -> Tensor:
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return borders.to(gpu.device())


def peers(run: GpuRun) -> Iterator[Step]:
    """Last: what somebody else's kernel spoils, spoils nothing of ours."""
    plan, s = run.plan, run.plan.middle
    for name in gpu_rivals.PEERS:
        what = f"{name}, {tokens_text(s)}"
        need = bytes_of(plan, s, s, copies=12)
        yield Step("peers", what, 45, need, partial(_peer, name=name))


def _peer(run: GpuRun, name: str) -> Iterator[GpuRow]:
    """Forward, and forward with backward, beside ours over the same selection; flash-msa chooses
    by itself, so ours does as well there."""
    s = run.plan.middle
    x = run.inputs(s, s)
    selection = run.select(x)
    chooses = name == "flash-msa"

    def ours(*parts: Tensor) -> Tensor:
        chosen = run.select(x) if chooses else selection
        return sparse_attention(*parts, chosen, backend="triton")

    for kind, train in KINDS.items():
        leaves = [y.detach().requires_grad_(train) for y in (x.q, x.k, x.v)]
        what = f"{name}, {kind}, {tokens_text(s)}"
        try:
            made = gpu_rivals.PEERS[name](x, selection, *leaves)
            times = run.timed(_pass(lambda made=made: (made(),), leaves, train))
        except Exception as error:  # a peer that is not here is worth a line, not the run
            yield run.untimed(what, MISSING, reason(error), context=s)
            continue
        mine = run.timed(_pass(lambda leaves=leaves: (ours(*leaves),), leaves, train))
        note = "chooses by itself; its backward pass includes the KL's" if chooses else ""
        words = run.words(s, s)
        yield run.row(what, words, times, rival=("OpenMSA", mine), context=s, note=note)
