"""A case: inputs, the rule they are judged by, what must come out, and the trap that it sets.

One safetensors file a case. Tensors are named as the fields of Inputs; answers are "expected.*";
step N of a cache case has "step.N.*". Everything else is in the file's metadata, as json.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "assets" / "conformance"
FORMAT = "1"

MAIN, INDEX = ("q", "k", "v"), ("q_index", "k_index")
OPTIONAL = ("dout", "blocks", "row_weights", "mask", "cu_seqlens_q", "cu_seqlens_k")
GRADIENTS = ("dq", "dk", "dv", "dq_index", "dk_index")
CHECKS = ("blocks", "out", "lse", "loss", *GRADIENTS)


@dataclass(frozen=True)
class Rule:
    """The numbers of one case: tokens (block_size), blocks (top_k, *_blocks); None: 1 / sqrt(d).

    phase: "sparse", or "warmup" (dense attention, loss over the whole prefix).
    """

    block_size: int = 4
    top_k: int = 3
    local_blocks: int = 1
    sink_blocks: int = 0
    scale: float | None = None
    index_scale: float | None = None
    phase: str = "sparse"


@dataclass(frozen=True, eq=False)
class Inputs:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, dv], q_index [b, t, g, di], k_index [b, s, di].

    dout [b, t, h, dv]: gradients are those of sum(out * dout) + index loss. blocks int32 [b, g, t,
    top_k]: the selection to attend to; `imposed`: not the one that the rule would choose.
    row_weights [b, t] weigh the loss. mask bool [b, s]: the real tokens of padded rows.
    cu_seqlens_q, cu_seqlens_k int32 [n + 1]: packed sequences, b = 1.
    """

    rule: Rule
    q: Tensor
    k: Tensor
    v: Tensor
    q_index: Tensor
    k_index: Tensor
    dout: Tensor | None = None
    blocks: Tensor | None = None
    row_weights: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    imposed: bool = False

    @property
    def scale(self) -> float:
        return self.rule.scale or self.q.shape[-1] ** -0.5

    @property
    def index_scale(self) -> float:
        return self.rule.index_scale or self.q_index.shape[-1] ** -0.5

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def replace(self, **changes) -> Inputs:
        return dataclasses.replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {name: getattr(self, name) for name in (*MAIN, *INDEX, *OPTIONAL)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Inputs:
        """On a device; numbers in `dtype` (all inputs are exact in bfloat16), weights in fp32 or
        wider."""
        wide = torch.promote_types(dtype, torch.float32)
        moved = {}
        for name, tensor in self.tensors().items():
            number = tensor.is_floating_point()
            kind = wide if name == "row_weights" else dtype if number else tensor.dtype
            moved[name] = tensor.to(device=device, dtype=kind)
        return self.replace(**moved)

    def spans(self) -> list[Span]:
        """The sequences in it, each with its rows, query tokens and key tokens."""
        if self.packed:
            borders = [x.tolist() for x in (self.cu_seqlens_q, self.cu_seqlens_k)]
            pairs = ([slice(*two) for two in pairwise(x)] for x in borders)
            return [Span(slice(0, 1), *pair) for pair in zip(*pairs)]
        if self.mask is None:
            return [Span(slice(None), slice(None), slice(None))]
        spans, before = [], self.k.shape[1] - self.q.shape[1]
        for row, real in enumerate(self.mask):
            where = real.nonzero().flatten().tolist()
            first, last = where[0], where[-1] + 1
            queries = slice(max(first - before, 0), max(last - before, 0))
            spans.append(Span(slice(row, row + 1), queries, slice(first, last)))
        return spans

    @property
    def real_queries(self) -> Tensor | None:
        """bool [b, t], of padded rows."""
        return None if self.mask is None else self.mask[:, -self.q.shape[1] :]

    def only(self, span: Span) -> Inputs:
        """One sequence of it, neither padded nor packed."""
        rows, queries, keys = span.rows, span.queries, span.keys
        part = {name: getattr(self, name)[rows, queries] for name in ("q", "q_index")}
        part |= {name: getattr(self, name)[rows, keys] for name in ("k", "v", "k_index")}
        for name in ("dout", "row_weights"):
            tensor = getattr(self, name)
            part[name] = None if tensor is None else tensor[rows, queries]
        part["blocks"] = None if self.blocks is None else self.blocks[rows, :, queries]
        return self.replace(**part, mask=None, cu_seqlens_q=None, cu_seqlens_k=None)


@dataclass(frozen=True)
class Span:
    """Where one sequence lies: slices of the batch, the query tokens and the key tokens."""

    rows: slice
    queries: slice
    keys: slice


@dataclass(frozen=True, eq=False)
class Step:
    """One thing done to a cache: "append" (inputs, out), "crop" (to a length in tokens), "reorder"
    (rows) or "reload"."""

    do: str
    inputs: Inputs | None = None
    out: Tensor | None = None
    length: int = 0
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """trap: what the case is about; wrong: what an engine that falls into it does.

    expected: by name of CHECKS, fp64 (blocks int32). steps: of a cache case, which has no inputs.
    """

    name: str
    trap: str
    wrong: str
    inputs: Inputs | None = None
    expected: dict[str, Tensor] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


def save_case(case: Case, folder: Path) -> Path:
    """Write `folder`/name.safetensors; the same case gives the same bytes."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    about = {"format": FORMAT, "name": case.name, "trap": case.trap, "wrong": case.wrong}
    if case.inputs is not None:
        tensors |= case.inputs.tensors()
        tensors |= {f"expected.{name}": tensor for name, tensor in case.expected.items()}
        about["imposed"] = json.dumps(case.inputs.imposed)
    steps = []
    for number, step in enumerate(case.steps):
        steps.append({"do": step.do, "length": step.length, "rows": step.rows})
        if step.inputs is not None:
            named = {**step.inputs.tensors(), "out": step.out}
            tensors |= {f"step.{number}.{name}": tensor for name, tensor in named.items()}
    rule = (case.inputs or case.steps[0].inputs).rule
    about |= {"rule": json.dumps(dataclasses.asdict(rule)), "steps": json.dumps(steps)}
    path = folder / f"{case.name}.safetensors"
    made = save({name: tensor.contiguous() for name, tensor in tensors.items()}, about)
    path.write_bytes(_in_order(made))
    return path


def _in_order(made: bytes) -> bytes:
    """A safetensors file with the entries of its header sorted: they come in any order."""
    start = 8 + int.from_bytes(made[:8], "little")
    header = json.dumps(json.loads(made[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + made[start:]


def load_case(path: Path) -> Case:
    """Read what `save_case` wrote. Raises ValueError for a file of another format."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} has format {about.get('format')}, not {FORMAT}; make it anew")
    rule = Rule(**json.loads(about["rule"]))
    steps = []
    for number, step in enumerate(json.loads(about["steps"])):
        own = _under(f"step.{number}.", tensors)
        out = own.pop("out", None)
        inputs = Inputs(rule, **own) if own else None
        steps.append(Step(step["do"], inputs, out, step["length"], tuple(step["rows"])))
    named = {key: about[key] for key in ("name", "trap", "wrong")}
    if steps:
        return Case(**named, steps=tuple(steps))
    expected = _under("expected.", tensors)
    own = {name: tensors[name] for name in (*MAIN, *INDEX, *OPTIONAL) if name in tensors}
    inputs = Inputs(rule, **own, imposed=json.loads(about["imposed"]))
    return Case(**named, inputs=inputs, expected=expected)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def shipped_cases() -> dict[str, Path]:
    """The golden vectors that came with the package, by name, in the order of the recipes."""
    from openmsa.conformance.recipes import NAMES

    return {name: FOLDER / f"{name}.safetensors" for name in NAMES}
