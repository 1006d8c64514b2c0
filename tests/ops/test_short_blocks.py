"""sparse_attention over blocks of a token or a few, as token selection makes them."""

from __future__ import annotations

import pytest
import torch

from openmsa import Selection, dense_attention, sparse_attention
from openmsa.ops import native_calls, workspace
from tests.ops.test_memory import largest_allocation
from tests.support import (
    assert_as_good_as_eager,
    borders,
    eager_attention,
    every_backend,
    every_instruction_set,
    judged_backend,
    qkv,
    readable,
    seeded,
    widest,
)


def chosen(b, groups, t, s, block_size, top_k, *, seed=5):
    """Different blocks for every query and group: ascending, -1 at the end, all visible."""
    last = torch.arange(s - t, s) // block_size
    number = seeded(b, groups, t, -(-s // block_size), seed=seed)
    number.masked_fill_(torch.arange(number.shape[-1]) > last[:, None], -100)
    best, blocks = number.topk(min(top_k, number.shape[-1]))
    blocks = blocks.masked_fill(best == -100, s).sort(-1).values
    return blocks.masked_fill(blocks == s, -1).to(torch.int32)


def with_gradients(run, inputs, dout):
    out = run(*inputs)
    return (out, *torch.autograd.grad(out, inputs, dout))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "g", "groups", "d", "dv", "block_size", "top_k"),
    [
        (2, 29, 29, 4, 1, 1, 16, 16, 1, 9),  # DSA over one KV head
        (1, 23, 50, 6, 3, 1, 5, 7, 1, 12),  # one choice for three KV heads, unaligned
        (1, 17, 18, 4, 2, 4, 8, 8, 1, 5),  # a choice per query head
        (2, 1, 131, 8, 2, 2, 8, 8, 3, 11),  # decoding, short blocks and a shorter last one
        (1, 7, 40, 20, 1, 1, 72, 64, 1, 24),  # MLA read as one KV head, small
    ],
)
def test_output_and_gradients_are_as_good_as_eager(
    backend, dtype, b, t, s, h, g, groups, d, dv, block_size, top_k
):
    inputs = qkv(b, t, s, h, g, d, dv, dtype=dtype, grad=True)
    dout = seeded(b, t, h, dv, seed=7, dtype=dtype)
    selection = Selection(chosen(b, groups, t, s, block_size, top_k), block_size)
    read = readable(t, s, selection.blocks, block_size)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def ours(*x):
        return sparse_attention(*x, selection, backend=backend)

    def eager(*x):
        return eager_attention(*x, read, d**-0.5)

    results = (
        with_gradients(ours, inputs, dout),
        with_gradients(eager, inputs, dout),
        with_gradients(eager, exact, dout.double()),
    )
    for what, *three in zip(("out", "dq", "dk", "dv"), *results):
        assert_as_good_as_eager(*three, what=what)


@every_backend
def test_keeping_every_token_equals_dense(backend):
    q, k, v = qkv(2, 21, 21, 4, 2, 8, dtype=widest(backend))
    selection = Selection(chosen(2, 1, 21, 21, 1, 30), 1)
    out, lse = sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    dense, dense_lse = dense_attention(q, k, v, return_lse=True, backend="reference")
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)


@every_backend
def test_unsorted_repeated_and_future_tokens_add_nothing(backend):
    q, k, v = qkv(1, 20, 20, 4, 1, 8, dtype=widest(backend), grad=True)
    clean = torch.full((1, 1, 20, 7), -1, dtype=torch.int32)
    clean[..., 0], clean[:, :, 6:, 1] = 2, 6
    clean[:, :, :2] = -1
    messy = torch.tensor([6, -1, 20, 2, 2, 10**6, 6], dtype=torch.int32)
    messy = messy.expand(1, 1, 20, 7).contiguous()
    dout = seeded(1, 20, 4, 8, seed=3, dtype=q.dtype)
    results = [
        with_gradients(
            lambda *x, blocks=blocks: sparse_attention(*x, Selection(blocks, 1), backend=backend),
            (q, k, v),
            dout,
        )
        for blocks in (clean, messy)
    ]
    assert (results[0][0][:, :2] == 0).all()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@every_backend
def test_tokens_that_are_not_read_spoil_nothing(backend):
    q, k, v = qkv(1, 20, 20, 4, 1, 8, dtype=widest(backend))
    blocks = chosen(1, 1, 20, 20, 1, 4)
    out = sparse_attention(q, k, v, Selection(blocks, 1), backend=backend)
    k[:, 7], v[:, 11] = float("nan"), float("inf")
    spoilt = sparse_attention(q, k, v, Selection(blocks, 1), backend=backend)
    reads = ((blocks == 7) | (blocks == 11)).any(-1)[0, 0]
    assert reads.any() and not reads.all()
    torch.testing.assert_close(spoilt[:, ~reads], out[:, ~reads])
    assert spoilt[:, reads].isnan().all()


@every_backend
def test_packed_equals_alone_with_gradients(backend):
    tq, sk = (7, 0, 20, 1, 3), (9, 4, 20, 12, 3)
    q, k, v = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=widest(backend), grad=True)
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    parts = [chosen(1, 1, t, s, 1, 5) if t else None for t, s in zip(tq, sk)]
    parts = [torch.zeros(1, 1, 0, 5, dtype=torch.int32) if x is None else x for x in parts]
    parts = [torch.nn.functional.pad(x, (0, 5 - x.shape[-1]), value=-1) for x in parts]
    selection = Selection(torch.cat(parts, 2), 1)
    out = sparse_attention(q, k, v, selection, backend=backend, **packed)
    split = zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1), parts)
    alone = [sparse_attention(*x, Selection(blocks, 1), backend=backend) for *x, blocks in split]
    torch.testing.assert_close(out, torch.cat(alone, 1))
    dout = seeded(*out.shape, seed=9, dtype=out.dtype)
    together = torch.autograd.grad(out, (q, k, v), dout)
    apart = torch.autograd.grad(torch.cat(alone, 1), (q, k, v), dout)
    for a, b in zip(together, apart):
        torch.testing.assert_close(a, b)


@judged_backend
def test_repeats_bit_for_bit(backend):
    inputs = qkv(2, 40, 40, 4, 1, 8, dtype=torch.bfloat16, grad=True)
    selection = Selection(chosen(2, 1, 40, 40, 1, 9), 1)
    dout = seeded(2, 40, 4, 8, seed=3, dtype=torch.bfloat16)
    runs = [
        with_gradients(lambda *x: sparse_attention(*x, selection, backend=backend), inputs, dout)
        for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_threads_change_no_bit(backend, dtype, packed, monkeypatch):
    """Several ranges of keys, and several parts of what a token reads."""
    monkeypatch.setattr(native_calls, "_ONE_THREAD", 0)
    before, where = torch.get_num_threads(), {}
    inputs = qkv(1, 30, 900, 4, 2, 8, dtype=dtype, grad=True)
    blocks = chosen(1, 1, 30, 900, 1, 400)
    if packed:
        where = {"cu_seqlens_q": borders(1, 29), "cu_seqlens_k": borders(600, 300)}
    dout = seeded(1, 30, 4, 8, seed=3, dtype=dtype)
    runs = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        runs.append(
            with_gradients(
                lambda *x: sparse_attention(*x, Selection(blocks, 1), backend=backend, **where),
                inputs,
                dout,
            )
        )
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))
    definition = with_gradients(
        lambda *x: sparse_attention(*x, Selection(blocks, 1), backend="reference", **where),
        inputs,
        dout,
    )
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for a, b in zip(runs[0], definition):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("block_size", [1, 2])
def test_pieces_change_nothing_and_stay_small(block_size, monkeypatch):
    inputs = qkv(2, 40, 40, 4, 2, 8, dtype=torch.float64, grad=True)
    dout = seeded(2, 40, 4, 8, seed=3, dtype=torch.float64)
    selection = Selection(chosen(2, 2, 40, 40, block_size, 9), block_size)

    def run(*x):
        return sparse_attention(*x, selection, backend="portable")

    whole = with_gradients(run, inputs, dout)
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1 << 13)
    monkeypatch.setattr(workspace, "CACHE_BYTES", 1 << 13)
    for a, b in zip(whole, with_gradients(run, inputs, dout)):
        torch.testing.assert_close(a, b)

    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1 << 20)
    monkeypatch.setattr(workspace, "CACHE_BYTES", 1 << 20)
    q, k, v = qkv(1, 2048, 2048, 4, 2, 4, grad=True)
    many = Selection(chosen(1, 1, 2048, 2048, block_size, 4), block_size)
    largest = largest_allocation(
        lambda: sparse_attention(q, k, v, many, backend="portable").sum().backward()
    )
    assert largest < 2048 * 2048 / 2


@judged_backend
def test_mla_as_one_kv_head_in_full_width(backend):
    """DeepSeek-V3.2's shape: 128 heads read latents of 576 channels, and values of 512."""
    inputs = qkv(1, 2, 300, 128, 1, 576, 512, dtype=torch.float32, grad=True)
    selection = Selection(chosen(1, 1, 2, 300, 1, 130), 1)
    dout = seeded(1, 2, 128, 512, seed=7)
    read = readable(2, 300, selection.blocks, 1)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def eager(*x):
        return eager_attention(*x, read, 192**-0.5)

    results = (
        with_gradients(
            lambda *x: sparse_attention(*x, selection, scale=192**-0.5, backend=backend),
            inputs,
            dout,
        ),
        with_gradients(eager, inputs, dout),
        with_gradients(eager, exact, dout.double()),
    )
    for what, *three in zip(("out", "dq", "dk", "dv"), *results):
        assert_as_good_as_eager(*three, what=what)
