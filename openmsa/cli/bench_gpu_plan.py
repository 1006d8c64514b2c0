"""How much `openmsa bench gpu` measures, a row of it, and the steps that make rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openmsa.accounting import gpu, inputs, work
from openmsa.accounting.gpu import Roofs
from openmsa.accounting.inputs import Inputs, Shape
from openmsa.accounting.timing import Times
from openmsa.cli.bench_plan import Row, Run

NAN = float("nan")
MEASURED, CHECKED = "measured", "checked"
MISSING, SKIPPED, FAILED = "missing", "skipped", "failed"


@dataclass(frozen=True)
class GpuPlan:
    """Lengths in tokens; seconds of one measurement. Targets belong to the full shape on an H200.

    slice_flops: dense attention beyond that is measured on a part of its heads, and scaled.
    """

    shape: Shape = field(default_factory=Shape)
    dtype: torch.dtype = torch.bfloat16
    checked: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    checked_tokens: int = 1 << 12
    loss_queries: int = 128
    long: int = 1 << 17
    middle: int = 1 << 15
    prefill: tuple[int, ...] = tuple(1 << n for n in range(15, 21))
    decode: tuple[int, ...] = (1 << 16, 1 << 18, 1 << 20)
    batches: tuple[int, ...] = (1, 8, 64)
    hidden: int = 6144
    cases: int = 4
    most_queries: int = 1 << 14
    matmul_size: int = 8192
    copy_bytes: int = 1 << 30
    seconds: float = 0.4
    slice_flops: float = 3e14
    with_targets: bool = True


FULL = GpuPlan()
QUICK = GpuPlan(
    shape=Shape(h=4, g=2, d=16, d_index=16, block_size=16, top_k=2),
    dtype=torch.float32,
    checked=(torch.float32, torch.float16),
    checked_tokens=64,
    loss_queries=16,
    long=64,
    middle=48,
    prefill=(32, 64),
    decode=(64, 128),
    batches=(1, 2),
    hidden=32,
    cases=1,
    most_queries=48,
    matmul_size=64,
    copy_bytes=1 << 20,
    seconds=0.02,
    slice_flops=1e8,
    with_targets=False,
)


@dataclass(frozen=True)
class GpuRow(Row):
    """A line of the table; `ours` is NaN where nothing was timed, and `note` says why.

    floor_ms: what the operation must take at least at the roofs measured beside it.
    """

    part: str = ""
    status: str = MEASURED
    batch: int = 1
    floor_ms: float | None = None
    peak_bytes: int | None = None
    roofs: Roofs | None = None


@dataclass(frozen=True)
class Step:
    """One measurement that can fail by itself.

    seconds: about how long, compiling included; bytes: memory that it needs at least.
    """

    part: str
    what: str
    seconds: float
    bytes: int
    measure: Callable[[GpuRun], Iterable[GpuRow]]


@dataclass
class GpuRun(Run):
    """The plan, the operations on the triton backend, and the roofs measured last."""

    roofs: Roofs | None = None

    def inputs(self, t: int, s: int, dtype=None, data: str = "agreeing", batch: int = 1) -> Inputs:
        dtype = dtype or self.plan.dtype
        where = {"batch": batch, "device": gpu.device()}
        return inputs.make(self.plan.shape, t, s, dtype, data, **where)

    def timed(self, run: Callable[[], object]) -> Times:
        return gpu.timed(run, seconds=self.plan.seconds)

    def measure_roofs(self) -> None:
        plan = self.plan
        self.roofs = gpu.roofs(plan.dtype, plan.matmul_size, plan.copy_bytes)

    def words(self, t: int, s: int, batch: int = 1, dtype=None) -> str:
        words = self.plan.shape.words(t, s, dtype or self.plan.dtype)
        return words if batch == 1 else f"{batch} x {words}"

    def row(
        self,
        what: str,
        shape: str,
        times: Times,
        *,
        flops: float = 0,
        num_bytes: float = 0,
        rival: tuple[str, Times] | None = None,
        least_ratio: float | None = None,
        most_ms: float | None = None,
        **more,
    ) -> GpuRow:
        """Milliseconds beside a rival's and the roofs; a target is a ratio or a limit."""
        ours = tuple(1e3 * times.quantile(share) for share in (0.2, 0.5, 0.8))
        target, met, name, value, ratio = "", None, "", None, None
        if rival is not None:
            name, value = rival[0], 1e3 * rival[1].median
            ratio = value / ours[1]
        if self.plan.with_targets and most_ms is not None:
            target, met = f"<= {most_ms:g} ms", ours[1] <= most_ms
        if self.plan.with_targets and least_ratio is not None and ratio is not None:
            target, met = f"{least_ratio:g}", ratio >= least_ratio
        least = self.roofs.least_seconds(flops, num_bytes) if flops or num_bytes else None
        return GpuRow(
            what,
            shape,
            "time",
            "ms",
            ours,
            rival=name,
            rival_value=value,
            ratio=ratio,
            target=target,
            met=met,
            repeats=len(times.seconds),
            floor_ms=None if least is None else 1e3 * least,
            roofs=self.roofs,
            **more,
        )

    def untimed(self, what: str, status: str, note: str = "", **more) -> GpuRow:
        """A row without a time: what was checked, and what could not be measured, with why."""
        more = {"shape": "", **more}
        return GpuRow(what, metric="", unit="", ours=(NAN,) * 3, status=status, note=note, **more)


def bytes_of(plan: GpuPlan, t: int, s: int, batch: int = 1, copies: float = 3) -> int:
    """Memory of inputs and, `copies` times, of what is as large as the queries."""
    shape = plan.shape
    a_key = 2 * shape.g * shape.d + shape.d_index
    a_query = (copies + 1) * shape.h * shape.d + shape.g * shape.d_index
    return int(batch * plan.dtype.itemsize * (s * a_key + t * a_query))


def chosen_pairs(shape: Shape, t: int, s: int) -> int:
    """Visible keys of the chosen blocks, summed over query tokens and groups, of a selection that
    keeps as much as it may: the query's own block up to itself, and full ones."""
    position = torch.arange(s - t, s)
    full = (position // shape.block_size).clamp(max=shape.top_k - 1)
    return shape.g * int((full * shape.block_size + position % shape.block_size + 1).sum())


def msa_flops(shape: Shape, t: int, s: int) -> int:
    """Choosing and attending."""
    return work.select_flops(work.causal_pairs(t, s), shape.g, shape.d_index) + work.attend_flops(
        chosen_pairs(shape, t, s), shape.r, shape.d, shape.d
    )


def reason(error: BaseException) -> str:
    """An error in one line: its kind, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def differentiated(x: Inputs, attend: Callable[[Inputs], Tensor]):
    """(what computes dq, dk, dv from stored outputs, the gradient it starts at)"""
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    out = attend(Inputs(*leaves, x.q_index, x.k_index))
    dout = inputs.normal(*out.shape, dtype=out.dtype, seed=7, device=out.device)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), dout
