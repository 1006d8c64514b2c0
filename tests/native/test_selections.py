"""Selections that no selector makes: never a crash, and what the definition says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmsa import Selection, index_loss, sparse_attention
from tests.support import borders, every_instruction_set, index_qk, qkv, seeded

ONE_BACKEND = [HealthCheck.function_scoped_fixture]
EXTREMES = (-(2**31), -(2**31) + 1, -2, -1, 0, 1, 2, 3, 7, 8, 100, 2**24, 2**30, 2**31 - 1)


def results(backend, tensors, blocks, block_size, **where):
    q, k, v, q_index, k_index = tensors
    rule = {"backend": backend, **where}
    chosen = Selection(blocks, block_size)
    out, lse = sparse_attention(q, k, v, chosen, return_lse=True, **rule)
    dout = seeded(*out.shape, seed=5, dtype=out.dtype)
    made = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    if blocks.shape[1] != q.shape[2] or k.shape[2] == q.shape[2]:
        loss = index_loss(q, k, q_index, k_index, chosen, **rule)
        made += [loss, *torch.autograd.grad(loss, (q_index, k_index))]
    return made


def assert_is_the_definition(tensors, blocks, block_size, **where):
    ours = results("cpu", tensors, blocks, block_size, **where)
    definition = results("reference", tensors, blocks, block_size, **where)
    for found, truth in zip(ours, definition, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-5)


def inputs(b, t, s, h, g, d, dtype=torch.float32):
    return (
        *qkv(b, t, s, h, g, d, dtype=dtype, grad=True),
        *index_qk(b, t, s, g, d, dtype=dtype, grad=True),
    )


@every_instruction_set
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=ONE_BACKEND)
@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([1, 2, 4]),
    slots=st.integers(0, 9),
    block_size=st.sampled_from([1, 5, 16, 40]),
    packed=st.booleans(),
)
def test_any_numbers_are_read_as_defined(backend, seed, groups, slots, block_size, packed):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(EXTREMES), (1, groups, 23, slots), generator=generator)
    blocks = torch.tensor(EXTREMES, dtype=torch.int32)[picks]
    where = {}
    if packed:
        where = {"cu_seqlens_q": borders(8, 0, 15), "cu_seqlens_k": borders(9, 3, 47)}
    assert_is_the_definition(inputs(1, 23, 59, 4, 2, 8), blocks, block_size, **where)


@every_instruction_set
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layout_of_the_blocks_changes_nothing(backend, groups):
    tensors = inputs(2, 20, 40, 4, 2, 8)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(-1, 6, (2, groups, 20, 5), generator=generator, dtype=torch.int32)
    plain = results("cpu", tensors, blocks, 8)
    room = torch.full((2, groups, 20, 11), 10**6, dtype=torch.int32)
    room[..., 1:11:2] = blocks
    for strided in (room[..., 1:11:2], blocks.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        for a, b in zip(plain, results("cpu", tensors, strided, 8), strict=True):
            assert torch.equal(a, b)
    wide = blocks[:, :1, :1].expand(-1, groups, 20, -1)
    copied = results("cpu", tensors, wide.contiguous(), 8)
    for a, b in zip(copied, results("cpu", tensors, wide, 8), strict=True):
        assert torch.equal(a, b)


@every_instruction_set
@pytest.mark.parametrize("slots", [0, 1, 6])
@pytest.mark.parametrize("number", [-1, -(2**31), 2**31 - 1, 5])
def test_nothing_readable_gives_zeros(backend, slots, number):
    """Empty, negative, past the end: output 0, lse -inf, every gradient 0, loss 0."""
    tensors = inputs(2, 12, 20, 4, 2, 8)
    blocks = torch.full((2, 2, 12, slots), number, dtype=torch.int32)
    out, lse, *rest = results("cpu", tensors, blocks, 4)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert all((x == 0).all() for x in rest)


@every_instruction_set
def test_order_and_repeats_change_nothing(backend):
    tensors = inputs(1, 30, 30, 4, 2, 8)
    sorted_once = torch.tensor([0, 2, 3, 5, -1, -1, -1], dtype=torch.int32).expand(1, 2, 30, 7)
    shuffled = torch.tensor([5, 3, -1, 3, 0, 2, 5], dtype=torch.int32).expand(1, 2, 30, 7)
    pair = (results("cpu", tensors, blocks, 4) for blocks in (sorted_once, shuffled))
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b)
