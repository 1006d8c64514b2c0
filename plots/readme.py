"""The picture of the README, drawn from a finished demo.

    make demo && .venv/bin/python plots/readme.py runs/demo

Writes docs/figures/demo.png and, beside it, demo.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openmsa.evaluation.canvas import save
from openmsa.evaluation.evidence import ModelEvidence
from openmsa.evaluation.maps import needle_maps
from openmsa.evaluation.plain import read_json

NAMES = {"dense": "dense", "converted": "converted", "control": "untrained index"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, nargs="?", default=Path("runs/demo"))
    folder = parser.parse_args().demo / "steps"
    read = {
        name: read_json(ModelEvidence, folder / f"{file}.json").retrieval
        for file, name in NAMES.items()
    }
    target = Path(__file__).parent.parent / "docs" / "figures" / "demo"
    print(*save(needle_maps(read), target))


if __name__ == "__main__":
    main()
