"""Selection says what is wrong with it when it is made."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from openmsa import Selection
from openmsa.notation import LEGEND, PAPERS


def test_holds_blocks_and_block_size():
    blocks = torch.zeros(1, 2, 3, 4, dtype=torch.int32)
    chosen = Selection(blocks, 16)
    assert chosen.blocks is blocks
    assert chosen.block_size == 16


def test_cannot_be_changed():
    chosen = Selection(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.block_size = 8


@pytest.mark.parametrize(
    ("blocks", "block_size", "word"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.int32), 16, r"\[b, g, t, k\]"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.int64), 16, "int32"),
        (torch.zeros(1, 2, 3, 4), 16, "int32"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.int32), 0, "block_size"),
    ],
)
def test_refuses_what_is_no_selection(blocks, block_size, word):
    with pytest.raises(ValueError, match=word):
        Selection(blocks, block_size)


def test_legend_has_every_letter_and_six_papers():
    assert set(LEGEND) == set("btshgrdnk")
    assert len(PAPERS) == 6
    assert all("s" in signs.values() or "g" in signs.values() for signs in PAPERS.values())
