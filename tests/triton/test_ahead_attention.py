"""Attention and the index loss compiled for GPUs that are not here, as they are launched."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from openmsa.ops import gpu as gpus
from openmsa.ops import triton_launch
from tests.triton.ahead import GPUS, Launch, check

if gpus.interpreted():
    pytest.skip("kernels cannot be compiled under the interpreter", allow_module_level=True)

from openmsa.ops.index_loss.triton_loss import owner_loss, tile_loss
from openmsa.ops.reverse_index import KeyRows
from openmsa.ops.triton_attend import attend, join
from openmsa.ops.triton_attend_backward import add_pieces, owner_gradients, tile_gradients
from openmsa.ops.triton_owners import Items, Pieces
from openmsa.ops.triton_rows import Reads, Shape, Strides, keys_at_once
from openmsa.ops.triton_tiles import Places, padded, rows_for, unite

FP32, I32, I64 = torch.float32, torch.int32, torch.int64
THREE = ("i64 of 16", "i32 of 16", "i32 of 16")
TUPLES = {
    "members": Reads(I64, I32, I32, "i32"),
    "places": Places(I64, I64),
    "strides": Strides(THREE, THREE, THREE, THREE),
    "items": Items(I32, I64, I64, I64, I64),
    "rows": KeyRows(I64, I64),
}
KERNELS = {
    "attend": (attend, triton_launch.for_tiles),
    "tile_gradients": (tile_gradients, triton_launch.for_tiles),
    "owner_gradients": (owner_gradients, triton_launch.for_owners),
    "tile_loss": (tile_loss, triton_launch.for_losses),
    "owner_loss": (owner_loss, triton_launch.for_owners),
}
FULL = ("lse", "delta", "parts", "weights", "kl", "student_lse")

# dtype, query tokens, heads of a group, d, block size, the whole prefix
TRAINING = (torch.bfloat16, 4096, 16, 128, 128, False)
DECODING = (torch.bfloat16, 1, 16, 128, 128, False)
WHOLE = (torch.bfloat16, 4096, 16, 128, None, True)
OTHERS = {
    "fp16": (torch.float16, 4096, 16, 128, 128, False),
    "fp32": (FP32, 4096, 16, 128, 128, False),
    "fp32 narrow": (FP32, 4096, 4, 64, 64, False),
    "fp32 narrowest": (FP32, 4096, 4, 32, 64, False),
    "narrow": (torch.bfloat16, 4096, 4, 64, 64, False),
    "wide": (torch.bfloat16, 4096, 8, 256, 256, False),
    "odd": (torch.bfloat16, 4096, 6, 80, 48, False),
    "many heads": (torch.bfloat16, 4096, 128, 128, 128, False),
}


def launch(name, which, dtype, t, r, d, block, whole) -> Launch:
    gpu = GPUS[name]
    kernel, rule = KERNELS[which]
    if whole and which in ("attend", "tile_gradients"):
        rule = triton_launch.for_prefixes
    made = rule(2 * padded(d), dtype.itemsize, gpu)
    keys = keys_at_once(made.keys, None if whole else block)
    shape = Shape(
        rows=rows_for(t, r, made.rows),
        heads=4 * r,
        groups=4,
        kv_heads=4,
        d=d,
        dv=d,
        D=padded(d),
        DV=padded(d),
        block=keys if whole else block,
        BN=keys,
        whole=whole,
        precision=gpu.fp32_precision if dtype == FP32 else "ieee",
    )
    arguments = {}
    for argument in kernel.arg_names:
        if argument in TUPLES:
            arguments[argument] = TUPLES[argument]
        elif argument == "S":
            arguments[argument] = shape
        elif argument in ("batches", "t", "s", "splits", "number"):
            arguments[argument] = "i32"
        elif argument in ("scale", "index_scale"):
            arguments[argument] = "fp32"
        else:
            loss = which.endswith("loss") and argument in ("dq", "dk")
            arguments[argument] = FP32 if argument in FULL or loss else dtype
    return Launch(kernel, arguments, made.num_warps, made.num_stages)


@pytest.mark.parametrize("which", KERNELS)
def test_training_uses_the_newest_matrix_instructions(which):
    assert "wgmma.mma_async" in check("sm_90", launch("sm_90", which, *TRAINING)).text


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("case", [TRAINING, WHOLE], ids=["training", "whole"])
def test_kernels_compile(name, which, case):
    check(name, launch(name, which, *case))


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_decoding_compiles(name):
    check(name, launch(name, "attend", *DECODING))


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("case", OTHERS)
def test_kernels_compile_in_every_shape(name, which, case):
    check(name, launch(name, which, *OTHERS[case]))


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_small_kernels_compile(name):
    shape = launch(name, "owner_gradients", *TRAINING).arguments["S"]
    parts = {"parts": FP32, "pieces": Pieces(I64, I64, "i32"), "rows": KeyRows(I64, I64)}
    numbers = {"number": "i32", "s": "i32"}
    halves = {"dk": torch.bfloat16, "dv": torch.bfloat16}
    check(name, Launch(add_pieces, {**parts, **halves, **numbers, "S": shape}, products=False))
    sums = {"parts": FP32, "stats": FP32, "out": torch.bfloat16, "lse": FP32}
    widths = {"rows": "i32", "splits": "i32", "d": 128, "D": 128, "N": 16}
    check(name, Launch(join, {**sums, **widths}, products=False))
    members = {"blocks": I32, "places": Places(I64, I64), "members": Reads(I64, I32, I32, "i32")}
    sizes = {"strides": ("i32",) * 4, "groups": "i32", "t": "i32", "k": "i32"}
    tile = {"BLOCK": 128, "TOKENS": 4, "WIDTH": 64}
    check(name, Launch(unite, {**members, **sizes, **tile}, num_warps=2, products=False))
