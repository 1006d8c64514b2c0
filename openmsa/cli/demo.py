"""openmsa demo: the whole job on the shipped model, told on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from openmsa.cli.console import say
from openmsa.cli.door import UsageError
from openmsa.cli.files import MEGABYTE, check_space

DESCRIPTION = (
    "Take the small dense model that ships with OpenMSA, convert it, warm its index, train it "
    "sparse, judge it beside the dense model and an untrained index, generate from a long context, "
    "and write report.html. Steps that are done are not done again."
)
EXAMPLE = "openmsa demo --quick --out runs/demo-quick"
SPACE = 400 * MEGABYTE  # three models of 12 MB, their optimiser states and checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of report.html and the models"
    )
    parser.add_argument("--quick", action="store_true", help="two minutes instead of ten")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is a file; name a folder")
    check_space(arguments.out, SPACE)
    from openmsa.cli.demo_steps import run_demo

    report = run_demo(arguments.out, quick=arguments.quick)
    say(f"open {report}")
