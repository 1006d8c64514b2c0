"""Code for new processors must not be picked by the linker for old ones."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from openmsa.native import EVERY_INSTRUCTION_SET

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", EVERY_INSTRUCTION_SET)
def test_objects_of_an_instruction_set_share_no_symbol_with_others(name):
    """A weak symbol is one function for the whole program, compiled with anybody's flags."""
    objects = sorted(ROOT.glob(f"build/*/CMakeFiles/kernels_{name}.dir/**/*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the objects of an editable install (build/) and nm")
    command = ["nm", "-C", "--defined-only", *map(str, objects)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=2) for line in listing.splitlines() if line.count(" ") >= 2]
    public = [(kind, text) for _, kind, text in symbols if kind not in "bdrt"]
    assert {text.split("(")[0] for _, text in public} == {
        f"openmsa::{name}::{symbol}"
        for symbol in ("select", "attend", "attend_backward", "index_loss", "table")
    }
    assert {kind for kind, _ in public} <= {"T", "D", "R"}
