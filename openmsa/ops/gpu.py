"""What must be known of a GPU before Triton kernels are launched; nothing here waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (*DTYPES, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Gpu:
    """Compute units, shared memory that one program may use, and the maker's tool chain."""

    units: int
    shared_bytes: int
    hip: bool = False
    capability: int = 90

    @property
    def fp32_precision(self) -> str:
        """How fp32 factors are multiplied by matrix instructions without losing fp32's digits."""
        return "ieee" if self.hip else "tf32x3"


# The chips that every kernel is compiled for ahead of time.
A100 = Gpu(units=108, shared_bytes=166_912, capability=80)
H200 = Gpu(units=132, shared_bytes=232_448, capability=90)
B200 = Gpu(units=148, shared_bytes=232_448, capability=100)
MI300X = Gpu(units=304, shared_bytes=65_536, hip=True, capability=94)
# One program at a time: cutting small problems into many would only cost time.
INTERPRETER = Gpu(units=1, shared_bytes=232_448)


@cache
@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """Why no Triton kernel can run here, or None."""
    try:
        number = version("triton")
    except PackageNotFoundError:
        return "the package triton is not installed"
    if tuple(int(part) for part in number.split(".")[:2]) < (3, 6):
        return f"it needs triton 3.6 or later, found {number}"
    if interpreted() or torch.cuda.is_available():
        return None
    return "there is no CUDA or ROCm device here"


@cache
@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Triton runs its kernels on the CPU, an instruction at a time: a tool for tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that holds a tensor, or the interpreter's stand-in."""
    if device.type != "cuda":
        return INTERPRETER
    facts = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    shared = facts.shared_memory_per_block if hip else facts.shared_memory_per_block_optin
    capability = 10 * facts.major + facts.minor
    return Gpu(facts.multi_processor_count, shared, hip, capability)
