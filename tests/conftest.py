"""Backends by name, and tests marked gpu, which are skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from openmsa import native
from openmsa.ops import gpu


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of a parameter such as "portable" or "cpu-avx2"; the latter runs that instruction
    set. With a GPU, "triton" has the whole test make its tensors there."""
    name, _, instructions = request.param.partition("-")
    usable = native.instruction_sets()
    if name == "cpu" and (instructions or "portable") not in usable:
        here = ", ".join(usable) or native.unavailable()
        pytest.skip(f"{request.param} cannot run here ({here})")
    if name == "triton":
        _only_what_triton_runs_here(request)
    on_gpu = name == "triton" and not gpu.interpreted()
    with (
        native.instruction_set(instructions) if instructions else nullcontext(),
        torch.device("cuda") if on_gpu else nullcontext(),
    ):
        yield name


def _only_what_triton_runs_here(request: pytest.FixtureRequest) -> None:
    """Skip without Triton or a GPU; the interpreter is wrong in bf16."""
    if (reason := gpu.unavailable()) is not None:
        pytest.skip(f"triton: {reason}")
    dtypes = request.node.callspec.params.values()
    if gpu.interpreted() and torch.bfloat16 in dtypes:
        pytest.skip("triton: its interpreter is wrong in bf16")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device here"))
