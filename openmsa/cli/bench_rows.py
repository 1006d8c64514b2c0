"""Rows of the benchmark as a csv tells them: the house's columns, then the machine's state."""

from __future__ import annotations

import shlex
import sys
from functools import cache

import torch

from openmsa.accounting import machine
from openmsa.accounting.rows import COLUMNS, common
from openmsa.cli.bench_plan import Row, Run

BENCH_COLUMNS = (
    *COLUMNS,
    "data",
    "rival",
    "rival_p50",
    "ratio",
    "at_least",
    "met",
    "right",
    "checked",
    "note",
    "repeats",
    "context",
    "backend",
    "instruction_set",
    "threads",
    "cores",
    "torch",
    "run",
)


def as_csv(row: Row, run: Run, stamp: str) -> dict[str, object]:
    """One row. stamp: the time at which its run began, the same in all its rows."""
    low, middle, high = (f"{value:.6g}" for value in row.ours)
    verdict = row.verdict
    return {
        "what": row.what,
        "shape": row.shape,
        "metric": row.metric,
        "unit": row.unit,
        "p20": low,
        "p50": middle,
        "p80": high,
        **_machine(stamp),
        "data": row.data,
        "rival": row.rival,
        "rival_p50": "" if row.rival_value is None else f"{row.rival_value:.6g}",
        "ratio": "" if row.ratio is None else f"{row.ratio:.4g}",
        "at_least": row.target,
        "met": {True: "yes", False: "no", None: ""}[row.met],
        "right": "" if verdict is None else ("yes" if verdict.ok else "no"),
        "checked": "" if verdict is None else verdict.words,
        "note": row.note,
        "repeats": row.repeats,
        "context": row.context or "",
        "backend": run.backend,
        "instruction_set": run.instruction_set,
        "threads": torch.get_num_threads(),
        "run": stamp,
    }


@cache
def _machine(stamp: str) -> dict[str, object]:
    """Asked once per run."""
    command = shlex.join(["openmsa", *sys.argv[1:]])
    return {**common(command), "cores": machine.cores(), "torch": torch.__version__}
