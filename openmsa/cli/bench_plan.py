"""How much the benchmark measures, and the operations with what was asked for filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openmsa.accounting import inputs, judge, roofs
from openmsa.accounting.inputs import Inputs, Shape
from openmsa.accounting.timing import Times
from openmsa.ops.block_selection import select_blocks
from openmsa.ops.dense_attention import dense_attention
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.selection import Selection

TOKEN_NAMES = ((1 << 20, "M"), (1 << 10, "K"))


@dataclass(frozen=True)
class Plan:
    """Lengths in tokens. Targets are those of docs/design.md and belong to the full shape."""

    shape: Shape = field(default_factory=Shape)
    hidden: int = 6144
    chunk: int = 2048
    select_keys: int = 1 << 17
    prefill: int = 1 << 15
    dense: int = 1 << 13
    decode: int = 1 << 20
    m3: int = 1 << 13
    fp32: int = 1 << 13
    crossing: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    context: tuple[int, int] = (1 << 11, 1 << 20)
    matmul_size: int = 2048
    read_bytes: int = 1 << 30
    seconds: float = 6.0
    slice_flops: float = 5e11
    whole_seconds: float = 8.0
    most_tokens: int = 1 << 20
    with_targets: bool = True


FULL = Plan()
QUICK = Plan(
    shape=Shape(h=8, g=2, d=16, d_index=16, block_size=16, top_k=4),
    hidden=64,
    chunk=64,
    select_keys=512,
    prefill=256,
    dense=128,
    decode=1024,
    m3=128,
    fp32=128,
    crossing=(32, 64, 128),
    context=(64, 1024),
    matmul_size=128,
    read_bytes=1 << 22,
    seconds=0.02,
    slice_flops=1e8,
    whole_seconds=0.05,
    most_tokens=2048,
    with_targets=False,
)


@dataclass(frozen=True)
class Row:
    """One line of the table. ours: (p20, median, p80) in `unit`; at_least: the target, if any."""

    what: str
    shape: str
    metric: str
    unit: str
    ours: tuple[float, float, float]
    data: str = "random"
    rival: str = ""
    rival_value: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    verdict: judge.Verdict | None = None
    note: str = ""
    repeats: int = 0
    context: int | None = None


@dataclass
class Run:
    """The plan, and the operations on the backend that was asked for."""

    plan: Plan
    backend: str
    instruction_set: str
    _roofs: dict[str, Callable[[], Times]] = field(default_factory=dict)

    def select(self, x: Inputs, **packed) -> Selection:
        size, k = self.plan.shape.block_size, self.plan.shape.top_k
        how = {"block_size": size, "top_k": k, "backend": self.backend}
        return select_blocks(x.q_index, x.k_index, **how, **packed)

    def attend(self, x: Inputs, selection: Selection, **packed) -> Tensor:
        return sparse_attention(x.q, x.k, x.v, selection, backend=self.backend, **packed)

    def msa(self, x: Inputs, **packed) -> Tensor:
        """Select and attend."""
        return self.attend(x, self.select(x, **packed), **packed)

    def dense(self, x: Inputs, **packed) -> Tensor:
        return dense_attention(x.q, x.k, x.v, backend=self.backend, **packed)

    def inputs(self, t: int, s: int, dtype: torch.dtype, data: str = "random") -> Inputs:
        return inputs.make(self.plan.shape, t, s, dtype, data)

    def warm_up(self) -> None:
        """Every operation once, on little: what a first call loads is no part of a measurement."""
        for dtype in (torch.bfloat16, torch.float32):
            x = self.inputs(2, 2, dtype)
            for y in (x.q, x.k, x.v):
                y.requires_grad_()
            (self.msa(x).sum() + self.dense(x).sum()).backward()

    def matmul(self, dtype: torch.dtype) -> Callable[[], Times]:
        name = inputs.name_of(dtype)
        if name not in self._roofs:
            self._roofs[name] = roofs.matmul(dtype, self.plan.matmul_size)
        return self._roofs[name]

    def against_matmul(
        self,
        what: str,
        shape: str,
        flops: int,
        measure: Callable[[], Times],
        *,
        dtype: torch.dtype,
        target: float,
        **more,
    ) -> Row:
        """A row of GFLOP/s beside torch's product of matrices in the same dtype."""
        times, roof = roofs.beside(self.matmul(dtype), measure)
        top = roofs.matmul_flops(self.plan.matmul_size) / roof / 1e9
        name = f"torch matmul, {inputs.name_of(dtype)} {self.plan.matmul_size}³"
        return self.rated(what, shape, "GFLOP/s", flops / 1e9, times, name, top, target, **more)

    def rated(
        self,
        what: str,
        shape: str,
        unit: str,
        amount: float,
        times: Times,
        roof: str,
        top: float,
        target: float,
        **more,
    ) -> Row:
        """A row of `amount` per second as a share of a roof."""
        rate = tuple(amount / times.quantile(share) for share in (0.8, 0.5, 0.2))
        ratio = rate[1] / top
        return Row(
            what,
            shape,
            "rate",
            unit,
            rate,
            rival=roof,
            rival_value=top,
            ratio=ratio,
            repeats=len(times.seconds),
            **self._target(ratio, target),
            **more,
        )

    def faster(
        self, what: str, shape: str, times: Times, rival: Times, name: str, target: float, **more
    ) -> Row:
        """A row of seconds beside a rival's seconds."""
        ratio = rival.median / times.median
        return Row(
            what,
            shape,
            "time",
            "s",
            tuple(times.quantile(share) for share in (0.2, 0.5, 0.8)),
            rival=name,
            rival_value=rival.median,
            ratio=ratio,
            repeats=len(times.seconds),
            **self._target(ratio, target),
            **more,
        )

    def _target(self, ratio: float, target: float) -> dict:
        if not self.plan.with_targets:
            return {}
        return {"target": f"{target:g}", "met": ratio >= target}


def tokens_text(tokens: int) -> str:
    """128K, 1M; what is no round number stays as it is."""
    for unit, name in TOKEN_NAMES:
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"
