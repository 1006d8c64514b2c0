"""Inputs are seeded, of the shapes asked for, and neighbours agree where they are told to."""

from __future__ import annotations

import pytest
import torch

import openmsa
from openmsa import Selection
from openmsa.accounting import inputs
from openmsa.accounting.inputs import Shape

SHAPE = Shape(h=4, g=2, d=16, d_index=8, block_size=8, top_k=3)


def test_shapes_and_seeds():
    x, again = (inputs.make(SHAPE, 5, 30, torch.bfloat16) for _ in range(2))
    assert x.q.shape == (1, 5, 4, 16) and x.k.shape == x.v.shape == (1, 30, 2, 16)
    assert x.q_index.shape == (1, 5, 2, 8) and x.k_index.shape == (1, 30, 8)
    assert all(torch.equal(a, b) for a, b in zip(vars(x).values(), vars(again).values()))
    assert not torch.equal(x.k, x.v)


def test_numbers_are_normal_beyond_one_piece(monkeypatch):
    monkeypatch.setattr(inputs, "PIECE", 1000)
    x = inputs.normal(25, 401, seed=0)
    assert abs(float(x.mean())) < 0.05 and float(x.std()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(x.flatten()[:1000], x.flatten()[1000:2000])


def test_the_last_queries_stand_in_front_of_fewer_keys():
    x = inputs.make(SHAPE, 6, 30, torch.float32)
    cut = x.last(2, 20)
    assert torch.equal(cut.q, x.q[:, 4:]) and torch.equal(cut.k_index, x.k_index[:, :20])


def test_neighbours_agree_where_they_should():
    found = {}
    for data in inputs.DATA:
        x = inputs.make(SHAPE, 256, 512, torch.float32, data)
        selection = openmsa.select_blocks(x.q_index, x.k_index, block_size=8, top_k=3)
        found[data] = inputs.agreement(selection)
    assert found["agreeing"] > found["random"] + 0.2


def test_agreement_counts_blocks_kept_from_the_query_before():
    blocks = torch.tensor([[[[0, 1, 2], [1, 2, 5], [7, -1, -1], [7, 8, -1]]]], dtype=torch.int32)
    assert inputs.agreement(Selection(blocks, 4)) == pytest.approx((2 + 0 + 1) / (3 + 1 + 2))
    assert inputs.agreement(Selection(blocks[:, :, :1], 4)) == 1


def test_other_data_is_refused():
    with pytest.raises(ValueError, match="random, agreeing"):
        inputs.make(SHAPE, 1, 1, torch.float32, "lucky")
