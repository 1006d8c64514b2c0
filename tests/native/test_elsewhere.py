"""Compilers and machines that are not this one: clang, and 64-bit Arm under an emulator.

Debian: apt install clang g++-aarch64-linux-gnu qemu-user-static
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

NATIVE = Path(__file__).parents[2] / "openmsa" / "native"
DRIVER = Path(__file__).parent / "elsewhere" / "driver.cpp"
KERNELS = ("select.cpp", "attend.cpp", "attend_backward.cpp", "index_loss.cpp", "table.cpp")
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-exceptions")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
X86 = {"avx512bf16": (*AVX512, "-mavx512bf16"), "avx512": AVX512, "avx2": AVX2, "portable": ()}
LINES = 3 * (1 + 2 * 9)  # a set prints, for every kind: a selection, and per support nine results

# Sums run in another order elsewhere, and end in the kind of the result.
TOLERANCE = {"f32": 2e-5, "f16": 2e-3, "bf16": 1.6e-2}


def outputs(folder: Path, compiler: str, sets: dict, run: tuple[str, ...] = ()) -> dict:
    """(set, number of the line) -> (result, kind, values), from the driver built by `compiler`."""
    objects = []
    for name, flags in sets.items():
        for source in KERNELS:
            objects.append(folder / f"{name}_{source}.o")
            where = ["-c", NATIVE / source, "-I", NATIVE, "-o", objects[-1]]
            command = [compiler, *FLAGS, *flags, f"-DOPENMSA_ISA={name}", *where]
            subprocess.run(command, check=True)
    sources = [DRIVER, NATIVE / "dispatch.cpp", NATIVE / "threads.cpp"]
    has = [f"-DOPENMSA_HAS_{name}" for name in sets]
    static = ["-static"] if run else []
    command = [compiler, *FLAGS, *has, "-I", NATIVE, *static, *sources, *objects, "-pthread"]
    subprocess.run([*command, "-o", folder / "driver"], check=True)
    done = subprocess.run([*run, folder / "driver"], check=True, capture_output=True, text=True)
    found: dict = {}
    for line in done.stdout.splitlines():
        name, what, kind, *values = line.split()
        place = sum(key[0] == name for key in found)
        found[name, place] = (what, kind, torch.tensor([float(x) for x in values]))
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> dict:
    """What the portable kernels compute when gcc builds them for this machine."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return outputs(tmp_path_factory.mktemp("here"), "g++", {"portable": ()})


def assert_same(found: dict, here: dict, sets: tuple[str, ...]) -> None:
    assert {name for name, _ in found} == set(sets)
    assert len(found) == LINES * len(sets) and len(here) == LINES
    for (name, place), (what, kind, values) in found.items():
        expected = here["portable", place]
        assert (what, kind) == expected[:2]
        assert values.isfinite().all() and values.numel() > 0
        if what == "select":
            assert torch.equal(values, expected[2]), (name, kind)
        elif what != "support":
            error = (values - expected[2]).abs().max() / expected[2].abs().max()
            assert error <= TOLERANCE[kind], (name, what, kind, error)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_set_by_every_compiler(compiler, here, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    found = outputs(tmp_path, compiler, X86)
    ran = tuple(name for name in X86 if (name, 0) in found)  # those this processor knows
    assert_same(found, here, ran)


@pytest.mark.slow
def test_arm(here, tmp_path):
    compiler = "aarch64-linux-gnu-g++"
    if not shutil.which(compiler) or not shutil.which("qemu-aarch64-static"):
        pytest.skip(f"needs {compiler} and qemu-aarch64-static")
    found = outputs(tmp_path, compiler, {"portable": ()}, ("qemu-aarch64-static",))
    assert_same(found, here, ("portable",))
