"""One schema for every measured number: a row of a csv in benchmarks/results."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "what",
    "shape",
    "metric",
    "unit",
    "p20",
    "p50",
    "p80",
    "device",
    "commit",
    "date",
    "command",
)


def record(file: str, rows: list[dict]) -> Path:
    """Append rows to benchmarks/results/<file>.csv; device, commit, date and command are added.

    A row names what, shape, metric, unit and p50, and p20 and p80 where a measurement was repeated.
    """
    path = RESULTS / f"{file}.csv"
    common = {
        "device": device(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    new = not path.exists()
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({**common, **row})
    return path


def device() -> str:
    """The processor or GPU, with what matters of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name") or platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit this ran on; "dirty" marks uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    told = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    return told.stdout.strip()
