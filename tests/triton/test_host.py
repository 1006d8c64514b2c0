"""The host's side of every triton operation as on a GPU: fake tensors, and kernels that do nothing.

What would wait for the device fails, since a fake tensor has no contents to read. Its device is
the CPU: without CUDA in torch no other one can be indexed.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from openmsa.ops import gpu as gpus

if gpus.interpreted():
    pytest.skip("kernels are real in the interpreter", allow_module_level=True)

from openmsa.ops import triton_attend, triton_attend_backward, triton_tiles
from openmsa.ops.block_selection import triton as selection
from openmsa.ops.block_selection import triton_select
from openmsa.ops.dense_attention import triton as dense
from openmsa.ops.dense_attention import triton_fused
from openmsa.ops.index_loss import triton as loss
from openmsa.ops.index_loss import triton_loss
from openmsa.ops.reverse_index import reverse_index
from openmsa.ops.sparse_attention import triton as sparse
from openmsa.selection import Selection
from tests.support import borders, qkv, seeded

OPS = Path(gpus.__file__).parent
B, T, S, H, G, D, BLOCK, K = 1, 300, 700, 32, 2, 64, 64, 4
BF16, FP32 = torch.bfloat16, torch.float32
CHIPS = {"A100": gpus.A100, "H200": gpus.H200, "MI300X": gpus.MI300X}


class Idle:
    """A kernel that only counts how often it was launched."""

    def __init__(self):
        self.launched = 0

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return self

    def __call__(self, *arguments, **options):
        self.launched += 1


@pytest.fixture(params=CHIPS)
def idle(request, monkeypatch):
    """Every kernel idle, on fake tensors of a chip: {kernel's name: how often it was launched}"""
    kernels = {
        triton_attend: ("attend", "join"),
        triton_attend_backward: ("tile_gradients", "owner_gradients", "add_pieces"),
        triton_tiles: ("unite",),
        triton_select: ("select_kernel", "merge_kernel"),
        triton_loss: ("tile_loss", "owner_loss"),
    }
    found = {}
    for module, names in kernels.items():
        for name in names:
            found[name] = Idle()
            monkeypatch.setattr(module, name, found[name])
    for module in (selection, dense, loss, sparse):
        monkeypatch.setattr(module, "gpu_of", lambda device: CHIPS[request.param])
    with FakeTensorMode():
        yield request.param, found


def made(*shape: int, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cpu")


def inputs(t=T, s=S):
    return made(B, t, H, D), made(B, s, G, D), made(B, s, G, D)


def packed(sequences: int | None) -> tuple:
    if sequences is None:
        return None, None
    return tuple(made(sequences + 1, dtype=torch.int32) for _ in "qk")


def shapes_of(found, *wanted) -> None:
    assert [(tuple(x.shape), x.dtype) for x in found] == [(tuple(x.shape), x.dtype) for x in wanted]


@pytest.mark.parametrize("sequences", [None, 3])
@pytest.mark.parametrize("t", [1, T])
def test_selection_waits_for_nothing(idle, sequences, t):
    borders = packed(sequences)
    arguments = (made(B, t, G, D), made(B, S, D), BLOCK, K, 1, 0, D**-0.5, *borders)
    shapes_of([selection._select._init_fn(*arguments)], made(B, G, t, K, dtype=torch.int32))
    assert idle[1]["select_kernel"].launched == 1


@pytest.mark.parametrize("sequences", [None, 3])
@pytest.mark.parametrize("groups", [1, G, H])
def test_sparse_attention_waits_for_nothing(idle, sequences, groups):
    q, k, v = inputs()
    blocks, borders = made(B, groups, T, K, dtype=torch.int32), packed(sequences)
    out, lse = sparse._forward._init_fn(q, k, v, blocks, BLOCK, 0.1, *borders)
    shapes_of((out, lse), q, made(B, T, H, dtype=FP32))
    gradients = sparse._backward._init_fn(
        torch.empty_like(out), out, q, k, v, blocks, lse, BLOCK, 0.1, *borders
    )
    shapes_of(gradients, q, k, v)
    launched = idle[1]
    assert launched["attend"].launched == launched["tile_gradients"].launched == 1
    assert launched["owner_gradients"].launched == 1


@pytest.mark.parametrize("sequences", [None, 3])
@pytest.mark.parametrize(("t", "dtype"), [(1, BF16), (T, BF16), (S, BF16), (S, FP32)])
def test_dense_attention_waits_for_nothing(idle, sequences, t, dtype):
    q, k, v = (x.to(dtype) for x in inputs(t))
    borders = packed(sequences)
    out, lse = dense._forward._init_fn(q, k, v, 0.1, *borders)
    shapes_of((out, lse), q, made(B, t, H, dtype=FP32))
    chip, launched = idle
    assert launched["attend"].launched == int(dtype == FP32 or chip == "MI300X")
    gradients = dense._backward._init_fn(torch.empty_like(out), out, q, k, v, lse, 0.1, *borders)
    shapes_of(gradients, q, k, v)
    assert launched["tile_gradients"].launched == launched["owner_gradients"].launched == 1


@pytest.mark.parametrize("sequences", [None, 3])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_the_index_loss_waits_for_nothing(idle, sequences, whole, with_lse):
    (q, k, _), borders = inputs(), packed(sequences)
    index = made(B, T, G, D), made(B, S, D)
    blocks = None if whole else made(B, G, T, K, dtype=torch.int32)
    lse = made(B, T, H, dtype=FP32) if with_lse else None
    found = loss._forward._init_fn(q, k, *index, blocks, None, lse, *borders, BLOCK, 0.1, 0.1, True)
    shapes_of(found, made(dtype=FP32), *(x.to(FP32) for x in index))
    assert idle[1]["tile_loss"].launched == idle[1]["owner_loss"].launched == 1


@pytest.mark.parametrize("sequences", [None, 3])
def test_the_reverse_index_waits_for_nothing(sequences):
    with FakeTensorMode():
        names = ("cu_seqlens_q", "cu_seqlens_k")
        where = dict(zip(names, packed(sequences)))
        blocks = made(2 if sequences is None else 1, G, T, K, dtype=torch.int32)
        found = reverse_index(Selection(blocks, BLOCK), S, **where)
        assert found.queries.shape == (blocks.numel(),)


WAITS = {"item", "tolist", "cpu", "nonzero", "numpy", "unique", "masked_select", "synchronize"}


def test_no_source_asks_the_device():
    """What fake tensors do not reach: names that wait, anywhere on the way to a launch."""
    files = [*OPS.glob("triton_*.py"), *OPS.glob("*/triton*.py")]
    for path in [*files, OPS / "gpu.py", OPS / "reverse_index.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not asked & WAITS, f"{path}: {asked & WAITS}"


RULE = {
    # (capability, dtype, t, s, d, dv, packed): kernel
    (90, BF16, 64, 64, 128, 128, False): "cudnn",
    (100, torch.float16, 64, 64, 64, 64, False): "cudnn",
    (90, BF16, 1, 64, 128, 128, False): "flash",  # splits the keys
    (90, BF16, 32, 64, 128, 128, False): "flash",  # the mask ends at the lower right
    (90, BF16, 64, 64, 128, 128, True): "flash",
    (90, BF16, 64, 64, 192, 192, False): "flash",
    (80, BF16, 64, 64, 128, 128, False): "flash",
    (80, BF16, 64, 64, 264, 264, False): None,
    (75, torch.float16, 64, 64, 128, 128, False): None,
    (90, FP32, 64, 64, 128, 128, False): None,
    (90, BF16, 64, 64, 128, 64, False): None,
    (90, BF16, 64, 64, 100, 100, False): None,
}


@pytest.mark.parametrize("case", RULE, ids=str)
def test_shape_alone_chooses_the_fused_kernel(case):
    capability, dtype, t, s, d, dv, together = case
    q, k, v = (
        torch.empty(1, n, 4, width, dtype=dtype, device="meta")
        for n, width in ((t, d), (s, d), (s, dv))
    )
    for hip, interpreted in itertools.product((False, True), repeat=2):
        gpu = gpus.Gpu(units=100, shared_bytes=1 << 17, hip=hip, capability=capability)
        chosen = triton_fused.kernel_for(q, k, v, packed=together, gpu=gpu, interpreted=interpreted)
        assert chosen == (None if hip or interpreted else RULE[case])


def test_who_sees_a_spoilt_key_is_told():
    """Packed, with an empty sequence; against loops."""
    tq, sk = (2, 0, 3), (4, 2, 3)
    borders = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (tq, sk)]
    spoilt = torch.rand(1, sum(sk), 2, generator=torch.Generator().manual_seed(1)) < 0.1
    places = triton_tiles.places_of(sum(tq), sum(sk), *borders, torch.device("cpu"))
    seen = triton_fused._sees(spoilt, places)
    for sequence, (t, s) in enumerate(zip(tq, sk)):
        q0, k0 = (int(border[sequence]) for border in borders)
        for i in range(t):
            visible = spoilt[:, k0 : k0 + s - t + i + 1]
            assert torch.equal(seen[:, q0 + i], visible.any(1))
    assert seen.any() and not seen.all()


def test_what_tests_are_made_of_follows_the_device():
    """With a GPU the `backend` fixture names it, and the bodies of tests/ops run there."""
    with torch.device("meta"):
        assert {x.device.type for x in (*qkv(1, 2, 3, 2, 1, 4), borders(2, 3))} == {"meta"}
    assert torch.equal(seeded(3), seeded(3)) and seeded(3).device.type == "cpu"
