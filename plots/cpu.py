"""Time against context on a CPU, drawn from the rows of `openmsa bench cpu`.

    .venv/bin/python plots/cpu.py benchmarks/results/cpu_sweep.csv

Draws the latest run in the file: docs/figures/cpu.png and, beside it, cpu.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openmsa.accounting.rows import read
from openmsa.cli.bench_pictures import draw

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    rows = ROOT / "benchmarks" / "results" / "cpu_sweep.csv"
    parser.add_argument("rows", type=Path, nargs="?", default=rows)
    print(*draw(read(parser.parse_args().rows), ROOT / "docs" / "figures" / "cpu"))


if __name__ == "__main__":
    main()
