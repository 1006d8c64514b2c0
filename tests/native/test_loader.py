"""Finding the kernels, asking for an instruction set by name, and what is said without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openmsa import dense_attention, native
from tests.support import qkv

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(native.unavailable() is not None, reason="no native kernels")


@needs_kernels
def test_instruction_sets_come_best_first_and_portable_is_always_there():
    usable = native.instruction_sets()
    assert usable[-1] == "portable"
    assert list(usable) == [name for name in native.EVERY_INSTRUCTION_SET if name in usable]
    assert native.chosen_instruction_set() == usable[0]


@needs_kernels
def test_instruction_set_is_asked_for_by_name_and_given_back():
    best = native.chosen_instruction_set()
    with native.instruction_set("portable"):
        assert native.chosen_instruction_set() == "portable"
        with pytest.raises(RuntimeError), native.instruction_set(best):
            assert native.chosen_instruction_set() == best
            raise RuntimeError
        assert native.chosen_instruction_set() == "portable"
    assert native.chosen_instruction_set() == best


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2"])
def test_refuses_an_unknown_instruction_set(name):
    listed = ", ".join(native.instruction_sets()) or "none"
    with (
        pytest.raises(ValueError, match=f"{name!r} cannot run here; usable: {listed}"),
        native.instruction_set(name),
    ):
        pass


WITHOUT = """
import sys, types
sys.modules["openmsa.native._kernels"] = None  # an import of it fails
{built}
import torch
from openmsa import dense_attention, native
from openmsa.ops import backend
assert native.unavailable() == backend.availability()["cpu"]
assert native.instruction_sets() == () and native.chosen_instruction_set() is None
assert backend.choose(None, "cpu", torch.float32) == "portable"
x = torch.ones(1, 5, 2, 4)
assert dense_attention(x, x, x).shape == x.shape
try:
    dense_attention(x, x, x, backend="cpu")
except ValueError as error:
    print(error)
"""
NO_COMPILER = 'sys.modules["openmsa.native._build"] = types.SimpleNamespace(WHY_NOT="no compiler")'
BROKEN = 'sys.modules["openmsa.native._build"] = types.SimpleNamespace(WHY_NOT=None)'


@pytest.mark.parametrize(
    ("built", "reason"),
    [
        ('sys.modules["openmsa.native._build"] = None', "OpenMSA runs from its folder"),
        (NO_COMPILER, "the native kernels are not built: no compiler"),
        (BROKEN, "the native kernels could not be loaded: import of"),
    ],
    ids=["not installed", "no compiler", "broken"],
)
def test_without_kernels_everything_works_and_the_reason_is_told(built, reason):
    code = WITHOUT.format(built=built)
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert "backend='cpu' is not usable on cpu" in said
    assert reason in said
    assert "usable: reference, portable" in said


def view(*size: int, kind: int = 0, strides: tuple | None = None):
    return 64, size, strides or (0, 0, 0, 0), kind


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": view(1, 9, 4, 8), "out": view(1, 9, 4, 8)}, "more query tokens than key tokens"),
        ({"q": view(1, 4, 3, 8)}, "multiple of KV heads"),
        ({"q": view(1, 4, 4, 7)}, "q and k differ in channels"),
        ({"q": view(2, 4, 4, 8)}, "q and out differ"),
        ({"q": view(1, 4, 4, 8, kind=3)}, "kind is 0, 1 or 2"),
        ({"q": view(1, 4, 4, 8, kind=1)}, "q and k differ in dtype"),
        ({"q": view(1, 4, 4)}, "four sizes and four strides"),
        ({"v": view(1, 7, 2, 8)}, "k and v differ"),
        ({"out": view(1, 4, 4, 9)}, "v and out differ in channels"),
        ({"blocks": (64, (1, 3, 4, 2), (0, 0, 0, 0))}, "1, g or h groups"),
        ({"blocks": (64, (1, 2, 5, 2), (0, 0, 0, 0))}, "blocks are of other queries"),
        ({"set": 9}, "no such instruction set"),
    ],
)
def test_kernels_refuse_sizes_that_do_not_fit(changes, message):
    """Nothing at address 64 may be read: sizes are compared before anything else."""
    given = {
        "set": 0,
        "threads": 1,
        "q": view(1, 4, 4, 8),
        "k": view(1, 8, 2, 8),
        "v": view(1, 8, 2, 8),
        "blocks": None,
        "block_size": 4,
        "scale": 1.0,
        "out": view(1, 4, 4, 8),
        "lse": 64,
        "borders": None,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        native._kernels.attend(*given.values())


@needs_kernels
@pytest.mark.parametrize(
    ("borders_q", "borders_k", "message"),
    [
        ([0, 5, 4, 8], [0, 5, 5, 8], "cu_seqlens_q must ascend"),
        ([0, 4, 9], [0, 4, 8], "cu_seqlens_q must ascend from 0 to the query tokens"),
        ([1, 4, 8], [0, 4, 8], "cu_seqlens_q must ascend from 0"),
        ([0, 4, 8], [0, 9, 8], "cu_seqlens_k must ascend"),
        ([0, 4, 8], [0, 3, 8], "more query tokens than key tokens"),
    ],
)
def test_operators_refuse_borders_that_no_door_has_read(borders_q, borders_k, message):
    """A compiled graph reaches the operator without the door's look at the contents."""
    q, k, v = qkv(1, 8, 8, 4, 2, 8)
    where = [torch.tensor(x, dtype=torch.int32) for x in (borders_q, borders_k)]
    with pytest.raises(ValueError, match=message):
        torch.ops.openmsa.cpu_dense_attention(q, k, v, 0.5, *where)
    assert dense_attention(q, k, v).isfinite().all()


SHORT_OF_MEMORY = """
import resource
import torch
from openmsa import dense_attention, native
from openmsa.ops.native_calls import view
wide = 1 << 20
q, k = torch.ones(1, 1, 1, wide), torch.ones(1, 1, 1, wide).expand(1, 256, 1, wide)
out, lse = torch.empty(1, 1, 1, wide), torch.empty(1, 1, 1)
call = (1, view(q), view(k), view(k), None, 1, 1.0, view(out), lse.data_ptr(), None)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))
try:
    native.attend(*call)
except MemoryError:
    print("no memory")
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory as Linux does")
def test_workspace_that_is_not_there_is_a_memory_error():
    command = [sys.executable, "-c", SHORT_OF_MEMORY]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.stdout == "no memory\n", made.stderr
