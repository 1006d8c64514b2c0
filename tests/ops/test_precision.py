"""Autocast, compiling, checkpointing: the same numbers whichever way an operation is reached."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from openmsa import Selection, dense_attention, index_loss, msa_attention, sparse_attention
from tests.support import CPU, borders, every_backend, index_qk, judged_backend, qkv

# What torch sees of an operator is the same for every instruction set.
one_of_each = pytest.mark.parametrize("backend", ["portable", CPU[-1]], indirect=True)


def some_selection():
    blocks = torch.tensor([0, 2, 5], dtype=torch.int32).expand(1, 2, 30, 3).contiguous()
    return Selection(blocks, 4)


@every_backend
def test_autocast_computes_in_its_dtype_as_torch_does(backend):
    q, k, v = qkv(1, 30, 30, 4, 2, 8, grad=True)
    low = [x.detach().bfloat16() for x in (q, k, v)]
    for run in (
        lambda *x: sparse_attention(*x, some_selection(), backend=backend),
        lambda *x: dense_attention(*x, backend=backend),
    ):
        expected = run(*low)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(q, k.bfloat16(), v)
            gradient = torch.autograd.grad(out.float().sum(), q)[0]
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected)
        assert gradient.dtype == torch.float32


@every_backend
def test_index_loss_stays_fp32_under_autocast(backend):
    q, k, _ = qkv(1, 30, 30, 4, 2, 8)
    q_index, k_index = index_qk(1, 30, 30, 2, 8, grad=True)
    q, k = q.bfloat16(), k.bfloat16()
    plain = index_loss(q, k, q_index, k_index, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        loss = index_loss(q, k, q_index, k_index, backend=backend)
    gradient = torch.autograd.grad(loss, k_index)[0]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, k_index)[0])


@one_of_each
@pytest.mark.parametrize("phase", ["dense", "warmup", "sparse"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_compiles_without_a_graph_break(backend, phase, packed):
    where = {"cu_seqlens_q": borders(7, 0, 23)} if packed else {}
    b = 1 if packed else 2
    tensors = (*qkv(b, 30, 30, 4, 2, 8, grad=True), *index_qk(b, 30, 30, 2, 8, grad=True))

    def layer(*x):
        made = msa_attention(*x, block_size=4, top_k=3, phase=phase, backend=backend, **where)
        loss = made.out.square().sum()
        return made.out, loss if made.index_loss is None else loss + made.index_loss

    def run(call):
        out, loss = call(*tensors)
        return (out, *torch.autograd.grad(loss, tensors, allow_unused=True))

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(layer), run(compiled)):
        assert (eager is None) == (traced is None)
        if eager is not None:
            torch.testing.assert_close(eager, traced)


@judged_backend
def test_checkpointing_recomputes_the_same(backend):
    tensors = (*qkv(1, 30, 30, 4, 2, 8, grad=True), *index_qk(1, 30, 30, 2, 8, grad=True))

    def layer(*x):
        made = msa_attention(*x, block_size=4, top_k=3, backend=backend)
        return made.out.square().sum() + made.index_loss

    plain = torch.autograd.grad(layer(*tensors), tensors)
    saved = torch.autograd.grad(checkpoint(layer, *tensors, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved))


OPERATORS = ["select_blocks", "sparse_attention", "dense_attention", "index_loss"]


@one_of_each
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_operators_are_registered_as_torch_asks(backend, name, packed):
    q, k, v = qkv(1, 9, 11, 4, 2, 3, grad=True)
    q_index, k_index = index_qk(1, 9, 11, 2, 3)
    where = (borders(4, 5), borders(5, 6)) if packed else (None, None)
    blocks = torch.tensor([0, 1, -1], dtype=torch.int32).expand(1, 2, 9, 3).contiguous()
    arguments = {
        "select_blocks": (q_index, k_index, 3, 2, 1, 0, 0.5, *where),
        "sparse_attention": (q, k, v, blocks, 3, 0.5, *where),
        "dense_attention": (q, k, v, 0.5, *where),
        "index_loss": (q, k, q_index, k_index, blocks, None, None, *where, 3, 0.5, 0.5, False),
    }
    operator = getattr(torch.ops.openmsa, f"{backend}_{name}").default
    torch.library.opcheck(operator, arguments[name])
