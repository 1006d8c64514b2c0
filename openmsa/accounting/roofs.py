"""What this machine gives at most, as torch gets it: matrix products and reading memory.

A roof is measured just before and just after what is held against it: clocks and neighbours change
within seconds, and a ratio of two numbers from different minutes says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from openmsa.accounting.timing import Times, timed

Result = TypeVar("Result")
SECONDS = 0.4


def matmul(dtype: torch.dtype, size: int = 2048) -> Callable[[], Times]:
    """A measurement of the product of two square matrices."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    c = torch.empty(size, size, dtype=dtype)
    return lambda: timed(lambda: torch.mm(a, b, out=c), seconds=SECONDS)


def matmul_flops(size: int = 2048) -> int:
    return 2 * size**3


def read(num_bytes: int) -> Callable[[], Times]:
    """A measurement of adding up fp32 numbers that fill `num_bytes`."""
    numbers = torch.ones(num_bytes // 4)
    return lambda: timed(numbers.sum, seconds=SECONDS)


def beside(roof: Callable[[], Times], run: Callable[[], Result]) -> tuple[Result, float]:
    """(what `run` returns, median seconds of the roof measured before and after it)."""
    before = roof()
    result = run()
    return result, Times(before.seconds + roof().seconds).median
