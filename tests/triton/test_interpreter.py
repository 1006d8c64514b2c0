"""The bodies of the operation tests on the triton backend, with no GPU: in Triton's interpreter.

The interpreter must be asked for before Triton is loaded, hence a process of its own. What is
picked here takes seconds; the slow test runs every body of a file. With a GPU they run there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PICKED = {
    "tests/ops/test_block_selection.py": "definition or equal_scores or nan_scores or packed",
    "tests/ops/test_sparse_attention.py": "packed or nothing_selected",
    "tests/triton/selection_bodies.py": "",
    "tests/triton/attention_bodies.py": "rules or popular or (compiles and one-dense)",
}
WHOLE = [
    "tests/ops/test_block_selection.py",
    "tests/ops/test_sparse_attention.py",
    "tests/ops/test_dense_attention.py",
    "tests/ops/test_index_loss.py",
    "tests/triton/attention_bodies.py",
]


def run(file: str, names: str) -> None:
    """The tests of a file on triton whose names fit; some must have run."""
    chosen = f"triton and ({names})" if names else "triton"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-2000:]


@pytest.mark.parametrize("file", PICKED)
def test_picked_bodies(file):
    run(file, PICKED[file])


@pytest.mark.slow
@pytest.mark.parametrize("file", WHOLE)
def test_every_body(file):
    run(file, "")
