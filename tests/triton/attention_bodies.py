"""Traced, compiled and repeated: what the triton operations owe to torch; run by
test_interpreter.py, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from openmsa import Selection, dense_attention, index_loss, select_blocks, sparse_attention
from openmsa.ops import gpu as gpus
from tests.support import borders, index_qk, qkv, seeded

pytestmark = pytest.mark.skipif(gpus.unavailable() is not None, reason=str(gpus.unavailable()))

HERE = "cpu" if gpus.unavailable() is None and gpus.interpreted() else "cuda"
RULE = {"block_size": 16, "top_k": 2}
OPERATIONS = ("select", "sparse", "dense", "loss", "whole loss")


def operation(name: str, together: bool = False):
    """(function, its inputs on the device, the inputs that get gradient)"""
    lengths = {"cu_seqlens_q": borders(9, 0, 11), "cu_seqlens_k": borders(30, 3, 17)}
    where = {key: value.to(HERE) for key, value in lengths.items()} if together else {}
    q, k, v = (x.to(HERE).requires_grad_() for x in qkv(1, 20, 50, 4, 2, 16))
    index = tuple(x.to(HERE).requires_grad_() for x in index_qk(1, 20, 50, 2, 16))
    blocks = select_blocks(*(x.detach() for x in index), **RULE, **where, backend="portable").blocks
    where["backend"] = "triton"
    if name == "select":
        return lambda *x: select_blocks(*x, **RULE, **where).blocks, index, 0
    if name == "sparse":

        def sparse(q, k, v, blocks):
            return sparse_attention(q, k, v, Selection(blocks, 16), **where)

        return sparse, (q, k, v, blocks), 3
    if name == "dense":
        return lambda *x: dense_attention(*x, **where), (q, k, v), 3
    given = blocks if name == "loss" else None

    def loss(q_index, k_index):
        chosen = None if given is None else Selection(given, 16)
        return index_loss(q, k, q_index, k_index, chosen, **where)

    return loss, index, 2


def results(run, inputs, gradients: int) -> list[torch.Tensor]:
    out = run(*inputs)
    if not gradients:
        return [out]
    dout = seeded(1, *out.shape, seed=5)[0].to(HERE)
    return [out, *torch.autograd.grad(out, inputs[:gradients], dout)]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("together", [False, True], ids=["one", "packed"])
def test_triton_compiles_in_one_graph_with_gradients(name, together):
    """AOTAutograd traces forward and backward with the operations' fake implementations."""
    run, *rest = operation(name, together)
    plain = results(run, *rest)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(results(compiled, *rest), plain):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", ["sparse", "dense", "loss", "whole loss"])
@pytest.mark.parametrize("together", [False, True], ids=["one", "packed"])
def test_triton_repeats_bit_for_bit(name, together):
    run, *rest = operation(name, together)
    for one, other in zip(results(run, *rest), results(run, *rest)):
        assert torch.equal(one, other)


def test_triton_repeats_where_a_popular_block_is_cut():
    """One block in every list: its sums come in pieces, which are added in their order."""
    q, k, v = (x.to(HERE).requires_grad_() for x in qkv(1, 90, 90, 2, 1, 16))
    blocks = torch.zeros(1, 1, 90, 2, dtype=torch.int32, device=HERE)
    blocks[..., 1] = torch.arange(90, device=HERE, dtype=torch.int32) // 16
    selection = Selection(blocks, 16)
    dout = seeded(1, 90, 2, 16, seed=3).to(HERE)

    def gradients(backend):
        out = sparse_attention(q, k, v, selection, backend=backend)
        return torch.autograd.grad(out, (q, k, v), dout)

    one, other = gradients("triton"), gradients("triton")
    for ours, again, definition in zip(one, other, gradients("portable")):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, definition)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("together", [False, True], ids=["one", "packed"])
def test_triton_is_captured_in_a_cuda_graph(name, together):
    """A graph that is replayed on new numbers gives what a call on them gives."""
    run, inputs, _ = operation(name, together)
    inputs = [x.detach() for x in inputs]
    with torch.no_grad():
        run(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(*inputs)
        for x in inputs:
            if x.is_floating_point():
                x.mul_(0.5)
        graph.replay()
        assert torch.equal(captured, run(*inputs))


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_triton_operations_keep_torchs_rules(name):
    """Schema, fake implementation and autograd registration agree with what runs."""
    (q, k, v), *_ = operation("dense")[1:]
    none = (None, None)
    if name == "sparse":
        blocks = operation("sparse")[1][3]
        from openmsa.ops.sparse_attention.triton import _forward

        arguments = (q, k, v, blocks, 16, 0.25, *none)
    else:
        from openmsa.ops.dense_attention.triton import _forward

        arguments = (q, k, v, 0.25, *none)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, arguments, test_utils=tests)
