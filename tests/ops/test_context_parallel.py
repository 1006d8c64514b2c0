"""A row of tokens shared by processes: the same output, loss and gradients as the whole row."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

import openmsa
from openmsa.ops.context_parallel import attend_in_chunks, gather_tokens, slice_context
from tests.processes import together
from tests.support import assert_as_good_as_eager, borders, index_qk, qkv, seeded

NAMES = ("q", "k", "v", "q_index", "k_index")
# Lengths that no number of chunks divides, one sequence and several, one of them a single token.
ROWS = ((61,), (7, 1, 30, 13))
SPARSE = {"block_size": 4, "top_k": 3}


def row(lengths, dtype) -> dict[str, torch.Tensor]:
    t = sum(lengths)
    main, index = qkv(1, t, t, 4, 2, 8, 6, dtype=dtype), index_qk(1, t, t, 2, 8, dtype=dtype)
    return {name: x.requires_grad_() for name, x in zip(NAMES, (*main, *index), strict=True)}


def whole(lengths, phase, dtype) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """out, index loss and gradients of all of the row in one process."""
    tensors, cu = row(lengths, dtype), borders(*lengths)
    result = openmsa.msa_attention(
        **tensors, **SPARSE, phase=phase, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="portable"
    )
    back = seeded(*result.out.shape, seed=7, dtype=dtype)
    ((result.out * back).sum() + result.index_loss).backward()
    return result.out.detach(), result.index_loss.detach(), {n: x.grad for n, x in tensors.items()}


def shared(lengths, phase, dtype) -> tuple[torch.Tensor, torch.Tensor, dict, torch.Tensor]:
    """The same for the tokens that this process holds; and which of the row they are."""
    context = slice_context(borders(*lengths))
    held = {n: context.take(x.detach()[0], 0.0)[None] for n, x in row(lengths, dtype).items()}
    held = {n: x.requires_grad_() for n, x in held.items()}

    def attend(part, chunk):
        cu = {"cu_seqlens_q": chunk.cu_seqlens_q, "cu_seqlens_k": chunk.cu_seqlens_k}
        result = openmsa.msa_attention(**part, **SPARSE, phase=phase, **cu, backend="portable")
        return result.out, result.index_loss

    queries = {n: held[n] for n in ("q", "q_index")}
    keys = {n: held[n] for n in ("k", "v", "k_index")}
    out, loss = attend_in_chunks(context, queries, keys, attend)
    assert out.shape[1] == len(context.places)
    loss = loss * (context.num_queries / context.num_tokens)
    back = context.take(seeded(sum(lengths), *out.shape[2:], seed=7, dtype=dtype), 0.0)
    ((out[0] * back).sum() + loss).backward()
    real = context.places < context.num_tokens
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {n: x.grad[:, real] for n, x in held.items()}
    return out.detach()[:, real], total, gradients, context.places[real]


def body(rank: int) -> None:
    for lengths in ROWS:
        for phase in ("warmup", "sparse"):
            truth, single = (whole(lengths, phase, d) for d in (torch.float64, torch.float32))
            out, loss, gradients, at = shared(lengths, phase, torch.float32)
            what = f"{lengths} {phase}"
            assert_as_good_as_eager(out, single[0][:, at], truth[0][:, at], f"out {what}")
            assert_as_good_as_eager(loss, single[1], truth[1], f"loss {what}")
            for name, found in gradients.items():
                expected = (x[2][name][:, at] for x in (single, truth))
                assert_as_good_as_eager(found, *expected, f"{name} {what}")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_process_has_its_part_of_the_whole(size, tmp_path):
    together(size, tmp_path, body)


def other_dtypes(rank: int) -> None:
    context = slice_context([0, 11])
    x = context.take(torch.arange(11), -1)[None]
    (row_,) = gather_tokens(context, x)
    assert row_[0, :11].tolist() == list(range(11)) and (row_[0, 11:] == -1).all()
    half = context.take(torch.arange(11.0), 0.0)[None, :, None].bfloat16().requires_grad_()
    (gathered,) = gather_tokens(context, half)
    # 256 + 1 is no bf16: the sum over processes is rounded once, at its end.
    gathered.backward(torch.full_like(gathered, 256.0 if rank == 0 else 3.0))
    assert half.grad.dtype == torch.bfloat16 and (half.grad == 260).all()
    with pytest.raises(ValueError, match="a row of 3 tokens is too short for 2 processes"):
        slice_context([0, 3])
    with pytest.raises(
        ValueError, match=r"must ascend from 0 to the tokens of the row, got \[0, 9"
    ):
        slice_context([0, 9, 5])


def test_tokens_come_in_the_order_of_the_row_and_their_gradients_back(tmp_path):
    together(2, tmp_path, other_dtypes)


def test_without_other_processes_it_is_refused():
    with pytest.raises(ValueError, match="needs a process group: start the program by torchrun"):
        slice_context([0, 64])
