"""openmsa compare: every mechanism from the same model, on the same tokens, on one page."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from openmsa.cli.console import say
from openmsa.cli.door import UsageError
from openmsa.cli.files import MEGABYTE, check_space

DESCRIPTION = (
    "Train MSA, NSA, MoBA, InfLLM-V2, DSA, a sliding window and dense attention from the small "
    "dense model that ships with OpenMSA (or from nothing), with equal tokens in equal order and "
    "128 tokens that a query may read; judge all by perplexity, retrieval, time and memory; write "
    "compare.html and compare.csv. Steps that are done are not done again."
)
EXAMPLE = "openmsa compare --quick --out runs/compare-quick"
MECHANISMS = ("dense", "window", "moba", "infllm2", "nsa", "dsa", "msa")
STARTS = ("dense", "scratch", "both")
SPACE = 100 * MEGABYTE  # a mechanism: two models of 12 MB, optimiser states, checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mechanism",
        nargs="+",
        choices=MECHANISMS,
        default=list(MECHANISMS),
        metavar="NAME",
        help=f"which, of {', '.join(MECHANISMS)}; dense, the one they are compared with, always is",
    )
    parser.add_argument(
        "--start",
        choices=STARTS,
        default="dense",
        help="dense: convert the shipped model and train on; scratch: from random weights",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder of the page and the models"
    )
    parser.add_argument("--quick", action="store_true", help="minutes instead of most of an hour")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is a file; name a folder")
    starts = STARTS[:2] if arguments.start == "both" else (arguments.start,)
    wanted = [name for name in MECHANISMS if name == "dense" or name in arguments.mechanism]
    check_space(arguments.out, SPACE * len(wanted) * len(starts))
    from openmsa.cli.compare_steps import run_comparison

    how = {"quick": arguments.quick, "command": _command(arguments, wanted)}
    for start in starts:
        out = arguments.out / start if arguments.start == "both" else arguments.out
        say(f"open {run_comparison(out, wanted, start=start, **how)}")


def _command(arguments: argparse.Namespace, wanted: list[str]) -> str:
    """What makes the same comparison again."""
    words = ["openmsa", "compare", "--start", arguments.start, "--out", str(arguments.out)]
    words += ["--quick"] if arguments.quick else []
    words += [] if wanted == list(MECHANISMS) else ["--mechanism", *wanted]
    return shlex.join(words)
