"""How far every mechanism is from code that nobody here wrote, by the tests that compare them.

    PYTHONPATH=path/to/MoBA/moba python benchmarks/mechanisms.py

Runs those tests and writes down the largest difference that they saw between numbers of ours and
of the other code, outputs and gradients together. What the tests allow is written in them. Needs
the other code: pip install --no-deps fla-core native-sparse-attention-pytorch, what those import,
and a clone of github.com/MoonshotAI/MoBA. A truth that is not here keeps the row it has.
"""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from openmsa.accounting import machine

ROOT = Path(__file__).parents[1]
CSV = ROOT / "benchmarks" / "results" / "mechanisms.csv"
COMMAND = "python benchmarks/mechanisms.py"
EQUATIONS = "its equations, with loops, fp64"


@dataclass(frozen=True)
class Truth:
    """Something to be held against: tests in `file` whose names hold `names`."""

    mechanism: str
    against: str
    package: str | None
    file: str
    names: str
    kind: str = "public code"


TRUTHS = (
    Truth(
        "dense",
        "softmax attention written out in eager torch, fp64",
        "torch",
        "tests/ops/test_dense_attention.py",
        "test_output_and_gradients_are_as_good_as_eager and dtype0",
        "the definition written out",
    ),
    Truth(
        "window",
        "transformers' sliding-window mask under eager attention (fp64)",
        "transformers",
        "tests/mechanisms/test_window.py",
        "test_the_window_is_that_of_transformers",
    ),
    Truth(
        "moba",
        "moba_naive.py of MoonshotAI/MoBA",
        None,
        "tests/mechanisms/test_moba.py",
        "test_is_the_official_naive_code",
    ),
    Truth(
        "infllm2",
        EQUATIONS,
        "torch",
        "tests/mechanisms/test_infllm2.py",
        "test_is_the_paper_with_gradients",
        "the definition written out",
    ),
    Truth(
        "nsa",
        "naive NSA of flash-linear-attention (compressed and selected branches)",
        "fla-core",
        "tests/mechanisms/test_nsa_peers.py",
        "test_fla_naive",
    ),
    Truth(
        "nsa",
        "SparseAttention of native-sparse-attention-pytorch (all branches, fp64)",
        "native-sparse-attention-pytorch",
        "tests/mechanisms/test_nsa_peers.py",
        "test_lucidrains",
    ),
    Truth(
        "dsa",
        "DeepseekV32Attention of transformers, MLA in its MQA form (fp64, its softmax in fp32)",
        "transformers",
        "tests/mechanisms/test_dsa.py",
        "test_transformers_deepseek_v32",
    ),
    Truth(
        "dsa",
        "naive DSA of flash-linear-attention",
        "fla-core",
        "tests/mechanisms/test_dsa.py",
        "test_flash_linear_attention",
    ),
    Truth(
        "msa",
        "MiniMax-M3's indexer and eager attention in transformers",
        "transformers",
        "tests/ops/test_against_transformers.py",
        "m3",
    ),
)


class Recorder:
    """Passed tests, and the largest difference that an assertion of theirs was shown."""

    def __init__(self) -> None:
        self.passed, self.failed, self.largest = 0, 0, 0.0

    def saw(self, ours, theirs) -> None:
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs))):
            if torch.is_tensor(a) and a.is_floating_point() and a.numel():
                gap = (a.detach().double() - b.detach().double()).abs()
                self.largest = max(self.largest, gap[gap.isfinite()].max().item())

    def pytest_runtest_logreport(self, report) -> None:
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        with self.listening(item.module):
            yield

    @contextmanager
    def listening(self, module):
        """torch's assert_close, and ours where the test has it, tell what they were shown."""
        close, judge = torch.testing.assert_close, getattr(module, "assert_as_good_as_eager", None)

        def told(ours, theirs, *rest, **how):
            self.saw(ours, theirs)
            close(ours, theirs, *rest, **how)

        def judged(ours, eager, truth, *rest, **how):
            self.saw(ours, truth)
            judge(ours, eager, truth, *rest, **how)

        torch.testing.assert_close = told
        if judge:
            module.assert_as_good_as_eager = judged
        try:
            yield
        finally:
            torch.testing.assert_close = close
            if judge:
                module.assert_as_good_as_eager = judge


def judge(truth: Truth, commit: str) -> dict | None:
    """The row of one truth; None where it is not installed. Raises AssertionError on a failure."""
    recorder = Recorder()
    wanted = f"({truth.names}) and not triton"
    pytest.main(["-q", "--no-header", str(ROOT / truth.file), "-k", wanted], plugins=[recorder])
    assert not recorder.failed, truth
    if not recorder.passed:
        return None
    return {
        "mechanism": truth.mechanism,
        "kind": truth.kind,
        "against": truth.against,
        "version": _version(truth.package),
        "test": f"{truth.file}, {truth.names}",
        "passed": recorder.passed,
        "largest_difference": f"{recorder.largest:.1e}",
        "device": machine.device(),
        "commit": commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": COMMAND,
    }


def _version(package: str | None) -> str:
    if package is None:
        folder = Path(importlib.import_module("moba_naive").__file__).parent
        command = ["git", "log", "-1", "--format=commit %h of %cs"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def main() -> None:
    kept = list(csv.DictReader(CSV.open(encoding="utf-8"))) if CSV.exists() else []
    known = {(row["mechanism"], row["against"]): row for row in kept}
    found, commit = [], machine.commit()
    for truth in TRUTHS:
        row = judge(truth, commit) or known.get((truth.mechanism, truth.against))
        if row is None:
            sys.exit(f"{truth.against} is not here; see the head of this file")
        found.append(row)
    with CSV.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
