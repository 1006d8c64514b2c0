"""The kernels' tests once more, watched by the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from openmsa import native

ROOT = Path(__file__).parents[2]

RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("openmsa.native._kernels", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""
# Fresh memory is full of 0xff, which is NaN as fp32, bf16 and fp16. Python itself leaks at exit.
OPTIONS = "detect_leaks=0:max_malloc_fill_size=67108864:malloc_fill_byte=255"
TESTS = ("tests/ops", "tests/native", "tests/mechanisms/test_msa.py")
# The sanitizers keep books of every byte asked for: gigabytes that nobody uses take minutes, and
# limits on memory stop the books themselves.
NOT_HERE = (
    "tests/native/test_large.py",
    "tests/native/test_loader.py::test_workspace_that_is_not_there_is_a_memory_error",
    "tests/ops/test_sparse_attention.py::test_more_than_two_to_the_31_keys",
)


def library(name: str) -> str:
    command = ["c++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The module, built with sanitizers in a folder of its own."""
    folder = tmp_path_factory.mktemp("sanitized")
    options = ("cmake.define.OPENMSA_SANITIZE=ON", f"build-dir={folder / 'build'}")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    command += [word for option in options for word in ("-C", option)]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [x for x in archive.namelist() if Path(x).name.startswith("_kernels.")]
        return Path(archive.extract(name, folder))


@pytest.mark.slow
@pytest.mark.skipif(native.unavailable() is not None, reason="no native kernels")
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="needs gcc")
def test_kernels_touch_only_what_is_theirs(sanitized):
    command = [sys.executable, "-c", RUN, str(sanitized), "-q", "-x", "-k", "cpu or native"]
    command += ["-p", "no:cacheprovider", "--capture=sys", *TESTS]
    command += [word for name in NOT_HERE for word in ("--deselect", name)]
    preload = " ".join(map(library, ("libasan.so", "libstdc++.so")))
    surroundings = {"PATH": "/usr/bin:/bin", "LD_PRELOAD": preload, "ASAN_OPTIONS": OPTIONS}
    surroundings |= {"OMP_NUM_THREADS": "1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    made = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
