"""Any strides, any shapes, any dtypes; memory that belongs to nobody is full of NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.native.workload import NAMES, differing, everything
from tests.support import borders, every_instruction_set, index_qk, qkv, seeded

LAYOUTS = (
    "contiguous",
    "sliced",
    "heads first",
    "every other",
    "one batch",
    "one head",
    "one token",
)
# The instruction set of a parameter stays as it is over all examples.
ONE_BACKEND = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, or the largest whole number, instead of what lay there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x with other strides; NaN lies around what is read. An expanded x repeats its first part."""
    axis = {"one batch": 0, "one token": 1, "one head": 2}.get(layout)
    if axis is not None and axis < x.dim() - 1 and x.shape[axis]:
        return laid_out(x.narrow(axis, 0, 1), "sliced").expand(x.shape)
    if layout == "heads first":
        return laid_out(x.transpose(1, -2), "sliced").transpose(1, -2)
    step = 2 if layout == "every other" else 1
    margin = 0 if layout == "contiguous" else 3
    room = x.new_full([n * step + 2 * margin for n in x.shape], math.nan)
    made = room[tuple(slice(margin, margin + n * step, step) for n in x.shape)]
    return made.copy_(x)


@st.composite
def problems(draw):
    """Sizes around the widths of panels and vectors, packed or not."""
    packed = draw(st.booleans())
    keys = draw(st.lists(st.integers(0, 150), min_size=1, max_size=4 if packed else 1))
    queries = [draw(st.integers(0, n)) for n in keys]
    groups, r = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16]))
    wide = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 33, 64, 80])
    where = {"cu_seqlens_q": borders(*queries), "cu_seqlens_k": borders(*keys)} if packed else {}
    sizes = {"b": 1 if packed else draw(st.integers(1, 2)), "t": sum(queries), "s": sum(keys)}
    sizes |= {"h": groups * r, "g": groups, "d": draw(wide), "dv": draw(wide)}
    rule = {
        "block_size": draw(st.sampled_from([1, 3, 16, 17, 32, 64])),
        "top_k": draw(st.integers(1, 9)),
    }
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 7))
    dtypes = [draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])) for _ in "qi"]
    return sizes, draw(wide), rule, where, layouts, dtypes


def made(sizes, d_index, layouts, dtypes, seed=0):
    b, t, s, h, g, dv = (sizes[name] for name in ("b", "t", "s", "h", "g", "dv"))
    tensors = (
        *qkv(**sizes, dtype=dtypes[0], seed=seed),
        *index_qk(b, t, s, g, d_index, dtype=dtypes[1], seed=seed + 10),
        seeded(b, t, h, dv, seed=seed + 20, dtype=dtypes[0]),
        seeded(b, t, seed=seed + 21).abs(),
    )
    return [laid_out(x, layout) for x, layout in zip(tensors, layouts, strict=True)]


@every_instruction_set
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=ONE_BACKEND)
@given(problem=problems())
def test_layout_changes_nothing(backend, problem):
    """Bit for bit what contiguous copies give, and what the definition gives in fp64."""
    sizes, d_index, rule, where, layouts, dtypes = problem
    *tensors, dout, weights = made(sizes, d_index, layouts, dtypes)
    ours = everything(tensors, dout=dout, row_weights=weights, **rule, **where)
    copies = [x.contiguous() for x in tensors]
    more = {"dout": dout.contiguous(), "row_weights": weights.contiguous()}
    assert differing(ours, everything(copies, **more, **rule, **where)) == []

    more = {"dout": dout.double(), "row_weights": weights}
    exact = [x.double() for x in copies]
    more |= {"blocks": ours[0], "backend": "reference"}
    definition = everything(exact, **more, **rule, **where)
    for name, found, truth in list(zip(NAMES, ours, definition, strict=True))[1:]:
        coarse = found.dtype if found.is_floating_point() else torch.float32
        if dtypes[1 if "index" in name or "loss" in name else 0] is not torch.float32:
            coarse = torch.bfloat16
        size = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0
        near = 4 * torch.finfo(max(coarse, dtypes[0], key=lambda x: torch.finfo(x).eps)).eps
        torch.testing.assert_close(
            found.double(),
            truth,
            rtol=near,
            atol=near * max(size, 1),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_beyond_short_blocks_is_never_read(backend, dtype):
    """Blocks that end in the middle of a panel, between tensors' margins of NaN."""
    for s in (1, 15, 17, 63, 65, 130):
        sizes = {"b": 2, "t": min(s, 21), "s": s, "h": 6, "g": 2, "d": 17, "dv": 9}
        tensors = made(sizes, 13, ["every other"] * 7, [dtype, dtype])
        *tensors, dout, weights = tensors
        rule = {"block_size": 32, "top_k": 3, "dout": dout, "row_weights": weights}
        for name, found in zip(NAMES, everything(tensors, **rule), strict=True):
            assert not found.isnan().any(), name
