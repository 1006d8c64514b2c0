"""The judge of a benchmark acquits the definition and convicts what is a little wrong."""

from __future__ import annotations

import pytest
import torch

import openmsa
from openmsa import Selection
from openmsa.accounting import inputs, judge
from openmsa.accounting.inputs import Inputs, Shape

SHAPE = Shape(h=4, g=2, d=16, d_index=16, block_size=8, top_k=3)
T, S = 40, 70
TOKENS = judge.sampled(T)


def made(dtype=torch.float32, data="random"):
    x = inputs.make(SHAPE, T, S, dtype, data)
    how = {"block_size": SHAPE.block_size, "top_k": SHAPE.top_k, "backend": "reference"}
    return x, openmsa.select_blocks(x.q_index, x.k_index, **how)


def attend(x: Inputs, selection: Selection | None):
    if selection is None:
        return openmsa.dense_attention(x.q, x.k, x.v, backend="portable")
    return openmsa.sparse_attention(x.q, x.k, x.v, selection, backend="portable")


def gradients(x: Inputs, selection, dout):
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
    out = attend(Inputs(*leaves, x.q_index, x.k_index), selection)
    return list(torch.autograd.grad(out, leaves, dout))


def test_samples_hold_the_first_and_the_last():
    assert judge.sampled(1) == [0]
    assert judge.sampled(2048)[0] == 0 and judge.sampled(2048)[-1] == 2047
    assert len(judge.sampled(2048)) == judge.SAMPLES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("data", inputs.DATA)
def test_what_is_right_is_acquitted(dtype, data):
    x, selection = made(dtype, data)
    assert judge.judge_selection(x, selection, TOKENS).ok
    dout = inputs.normal(*x.q.shape, dtype=dtype, seed=9)
    for chosen in (selection, None):
        assert judge.judge_attention(x, chosen, attend(x, chosen), TOKENS).ok
        assert judge.judge_gradients(x, chosen, dout, gradients(x, chosen, dout)).ok


@pytest.mark.parametrize("wrong", ["another", "unsorted", "future", "fewer", "not its own"])
def test_a_wrong_choice_is_convicted(wrong):
    x, selection = made()
    blocks = selection.blocks.clone()
    row = blocks[0, 1, T - 1]
    own = (S - 1) // SHAPE.block_size
    if wrong == "another":
        row[0] = next(m for m in range(own) if m not in row.tolist())
        row[:] = row.sort().values
    elif wrong == "unsorted":
        row[:] = row.flip(0)
    elif wrong == "future":
        row[-1] = own + 1
    elif wrong == "fewer":
        row[:] = torch.tensor([row[1], own, -1])
    else:
        row[:] = torch.arange(own - 3, own)
    assert not judge.judge_selection(x, Selection(blocks, SHAPE.block_size), TOKENS).ok


def test_blocks_that_tie_may_change_places():
    x, _ = made()
    x.k_index[:] = x.k_index[:, :1]
    blocks = torch.full((1, 2, T, 3), -1, dtype=torch.int32)
    for token in range(T):
        own = (S - T + token) // SHAPE.block_size
        blocks[:, :, token] = torch.tensor([own - 2, own - 1, own])
    assert judge.judge_selection(x, Selection(blocks, SHAPE.block_size), TOKENS).ok


@pytest.mark.parametrize("sparse", [True, False])
def test_a_wrong_output_is_convicted(sparse):
    x, selection = made()
    selection = selection if sparse else None
    out = attend(x, selection)
    out[0, TOKENS[2], 3] *= 1.01
    assert not judge.judge_attention(x, selection, out, TOKENS).ok
    out[0, TOKENS[2], 3] = torch.nan
    assert not judge.judge_attention(x, selection, out, TOKENS).ok


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_wrong_gradient_is_convicted(which, sparse):
    x, selection = made()
    selection = selection if sparse else None
    dout = inputs.normal(*x.q.shape, seed=9)
    found = gradients(x, selection, dout)
    found[which][0, :, 0] *= 1.01
    assert not judge.judge_gradients(x, selection, dout, found).ok
