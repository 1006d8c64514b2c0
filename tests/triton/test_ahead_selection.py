"""Block selection compiled for GPUs that are not here, as its backend launches it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from openmsa.ops import gpu as gpus
from openmsa.ops.block_selection.triton import launch_shape
from tests.triton.ahead import GPUS, Launch, check

if gpus.interpreted():
    pytest.skip("kernels cannot be compiled under the interpreter", allow_module_level=True)

from openmsa.ops.block_selection.triton_select import merge_kernel, select_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
MANY = 1 << 20

# dtype, rows, d_index, block_size, top_k, packed, split
PREFILL = (BF16, MANY, 128, 128, 16, False, False)
DECODE = (BF16, 4, 128, 128, 16, False, True)
OTHERS = {
    "fp8": (FP8, MANY, 128, 128, 16, False, False),
    "fp8 decode": (FP8, 4, 128, 128, 16, False, True),
    "fp16": (FP16, MANY, 64, 64, 16, False, False),
    "fp32": (FP32, MANY, 128, 128, 16, False, False),
    "packed": (BF16, MANY, 128, 128, 16, True, False),
    "64 blocks": (BF16, MANY, 128, 128, 64, False, False),
    "small blocks": (BF16, MANY, 16, 16, 64, False, False),
    "wide": (BF16, MANY, 256, 256, 16, False, False),
    "odd": (BF16, MANY, 80, 48, 12, True, False),
    "drafts": (BF16, 32, 128, 128, 16, False, True),
}


def launch(name, dtype, rows, d, block_size, top_k, packed, split) -> Launch:
    gpu = GPUS[name]
    shape = launch_shape(rows, d, dtype.itemsize, block_size, top_k, gpu)
    warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
    pointers = {
        "q_ptr": dtype,
        "k_ptr": dtype,
        "out_ptr": torch.int64 if split else torch.int32,
        "tiles_ptr": torch.int32 if packed else None,
    }
    strides = dict.fromkeys(("k_batch", "k_token"), "i32 of 16")
    numbers = dict.fromkeys(("t", "s", "local_blocks", "sink_blocks"), "i32")
    constants = {
        "GROUPS": 4,
        "D": d,
        "BLOCK": block_size,
        "TOP_K": top_k,
        "SCALE_FIRST": False,
        "PRECISION": gpu.fp32_precision if dtype == FP32 else "ieee",
    }
    arguments = {**pointers, **strides, **numbers, "scale": "fp32", **constants, **shape}
    return Launch(select_kernel, arguments, warps, stages)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_select_compiles(name, case):
    check(name, launch(name, *case))


def test_prefill_uses_the_newest_matrix_instructions():
    for name, word in (("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")):
        made = check(name, launch(name, *PREFILL))
        assert word in made.text and "mma.sync" not in made.text
        assert 2 * made.shared_bytes <= GPUS[name].shared_bytes  # two programs share a unit


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("case", OTHERS)
def test_select_compiles_in_every_shape(name, case):
    if OTHERS[case][0] == FP8 and name == "sm_80":
        pytest.skip("there the backend hands over bf16")
    check(name, launch(name, *OTHERS[case]))


@pytest.mark.parametrize("name", GPUS)
def test_merge_compiles(name):
    pointers = {"candidates_ptr": torch.int64, "out_ptr": torch.int32}
    constants = {"GROUPS": 4, "TOP_K": 16, "CANDIDATES": 8192}
    arguments = {**pointers, "t": "i32", "splits": "i32", **constants}
    check(name, Launch(merge_kernel, arguments, num_warps=8, products=False))
