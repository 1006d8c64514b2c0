"""Compiling kernels for GPUs that are not here, and reading what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from openmsa.ops.gpu import A100, B200, H200, MI300X

GPUS = {"sm_80": A100, "sm_90": H200, "sm_100": B200, "gfx942": MI300X}
# Any of these is a product of matrices by the units made for it.
MATRIX = {
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as a backend launches it. `arguments` holds, by name: a dtype for a pointer to it,
    "i32", "i64" or "fp32" for a number, a tuple of those, and for a constexpr its value."""

    kernel: object
    arguments: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    products: tuple[str, ...] | bool = True  # which matrix instructions it must hold; False: none
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    text: str  # the assembly
    shared_bytes: int
    stack_bytes: int  # spilled registers live there
    registers: int


def compile_for(name: str, launch: Launch) -> Compiled:
    """Compile for a GPU of GPUS, by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUS[name]
    kernel = launch.kernel
    signature, constants, aligned = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        value = launch.arguments[argument]
        if _is_passed(value):
            signature[argument] = _signature(value, (place,), aligned)
        else:
            signature[argument] = "constexpr"
            constants[argument] = value
    unknown = set(launch.arguments) - set(kernel.arg_names)
    assert not unknown, f"{kernel} has no arguments {unknown}"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    kind = ("hip", "gfx942", 64) if gpu.hip else ("cuda", gpu.capability, 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.options}
    made = triton.compile(source, target=GPUTarget(*kind), options=options)
    read = _read_amd if gpu.hip else _read_nvidia
    return read(made)


NUMBERS = ("i32", "i64", "fp32", "i32 of 16", "i64 of 16")


def _is_passed(value: object) -> bool:
    """At run time, that is; a tuple is if its first member is."""
    if isinstance(value, tuple):
        return _is_passed(value[0])
    return isinstance(value, torch.dtype) or value in NUMBERS


def _signature(value, place: tuple[int, ...], aligned: dict):
    """Triton's name for an argument's type; notes in `aligned` what 16 divides."""
    if isinstance(value, tuple):
        names = [_signature(each, (*place, i), aligned) for i, each in enumerate(value)]
        return type(value)(*names) if hasattr(value, "_fields") else tuple(names)
    if isinstance(value, torch.dtype):
        aligned[place] = [["tt.divisibility", 16]]
        return "*" + NAMES[value]
    if value.endswith(" of 16"):
        aligned[place] = [["tt.divisibility", 16]]
    return value.removesuffix(" of 16")


def check(name: str, launch: Launch) -> Compiled:
    """Compile, and hold the result to the rules: matrix instructions, no spills, shared memory."""
    made = compile_for(name, launch)
    limit = GPUS[name].shared_bytes
    assert made.shared_bytes <= limit, f"{made.shared_bytes} bytes of shared memory, {limit} exist"
    assert made.stack_bytes == 0, f"{made.stack_bytes} bytes spilled, {made.registers} registers"
    if launch.products:
        wanted = MATRIX[name] if launch.products is True else launch.products
        assert any(word in made.text for word in wanted), f"none of {wanted}"
    return made


def _read_nvidia(made) -> Compiled:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return Compiled(made.asm["ptx"], made.metadata.shared, stack, registers)


def _read_amd(made) -> Compiled:
    text = made.asm["amdgcn"]

    def fact(word: str) -> int:
        return int(re.search(rf"\.{word}:\s+(\d+)", text)[1])

    stack = fact("private_segment_fixed_size") + fact("vgpr_spill_count")
    return Compiled(text, made.metadata.shared, stack, fact("vgpr_count"))
