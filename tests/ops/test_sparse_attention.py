"""sparse_attention: exact over the selection, for every backend."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa import Selection, dense_attention, select_blocks, sparse_attention
from tests.support import (
    assert_as_good_as_eager,
    borders,
    eager_attention,
    every_backend,
    gradcheck,
    index_qk,
    judged_backend,
    qkv,
    readable,
    seeded,
    widest,
)


def chosen(b, t, s, groups, block_size, top_k, **packed):
    """A selection that differs between groups and queries."""
    rule = {"block_size": block_size, "top_k": top_k, "backend": "portable", **packed}
    return select_blocks(*index_qk(b, t, s, groups, 8), **rule)


def with_gradients(run, inputs, dout):
    out = run(*inputs)
    return (out, *torch.autograd.grad(out, inputs, dout))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "g", "groups", "d", "dv", "block_size", "top_k"),
    [
        (2, 67, 67, 8, 2, 2, 16, 16, 5, 3),
        (1, 33, 70, 6, 3, 1, 5, 7, 8, 4),  # one choice for all heads, odd widths, unaligned
        (1, 40, 41, 4, 2, 4, 8, 8, 4, 4),  # a choice per query head
        (2, 1, 131, 8, 2, 2, 32, 32, 8, 5),  # decoding
    ],
)
def test_output_and_gradients_are_as_good_as_eager(
    backend, dtype, b, t, s, h, g, groups, d, dv, block_size, top_k
):
    inputs = qkv(b, t, s, h, g, d, dv, dtype=dtype, grad=True)
    dout = seeded(b, t, h, dv, seed=7, dtype=dtype)
    selection = chosen(b, t, s, groups, block_size, top_k)
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
@pytest.mark.parametrize("s", [1, 15, 16, 17, 50])
def test_keeping_every_block_equals_dense(backend, s):
    q, k, v = qkv(2, s, s, 4, 2, 8, dtype=widest(backend))
    selection = chosen(2, s, s, 2, 4, 13)
    out, lse = sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    dense, dense_lse = dense_attention(q, k, v, return_lse=True, backend="reference")
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)


@every_backend
def test_lse_is_the_logarithm_of_the_sum(backend):
    q, k, v = qkv(1, 30, 30, 4, 2, 8)
    selection = chosen(1, 30, 30, 2, 4, 3)
    lse = sparse_attention(q, k, v, selection, return_lse=True, backend=backend, scale=0.7)[1]
    read = readable(30, 30, selection.blocks, 4).repeat_interleave(2, 1)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 0.7
    expected = scores.masked_fill(~read, -math.inf).logsumexp(-1).transpose(1, 2)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected)


@every_backend
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_unsorted_repeated_future_and_foreign_blocks_add_nothing(backend, packed):
    """A number past the end must not reach the next sequence, nor a repeated block count twice."""
    b, borders_of_two = (1, borders(15, 15)) if packed else (2, None)
    q, k, v = qkv(b, 30, 30, 4, 2, 8, dtype=widest(backend), grad=True)
    last = 3 if packed else 7  # blocks of 4 in 15 or in 30 keys
    clean = torch.full((b, 2, 30, 7), -1, dtype=torch.int32)
    clean[..., :2] = torch.tensor([0, 2])
    messy = torch.tensor([2, -1, last + 1, 0, 2, 10**6, 2], dtype=torch.int32)
    messy = messy.expand(b, 2, 30, 7).contiguous()
    messy[:, :, :8, 1] = last  # in the future
    messy[:, :, 15:23, 1] = last if packed else -7
    dout = seeded(b, 30, 4, 8, seed=3, dtype=q.dtype)

    def run(blocks):
        def attend(*x):
            return sparse_attention(
                *x,
                Selection(blocks, 4),
                cu_seqlens_q=borders_of_two,
                cu_seqlens_k=borders_of_two,
                backend=backend,
            )

        return with_gradients(attend, (q, k, v), dout)

    for a, b in zip(run(clean), run(messy)):
        torch.testing.assert_close(a, b)


@every_backend
def test_nothing_selected_gives_zero_and_no_gradient(backend):
    q, k, v = qkv(1, 8, 8, 2, 1, 4, grad=True)
    blocks = torch.zeros(1, 1, 8, 2, dtype=torch.int32)
    blocks[..., 1] = -1
    blocks[:, :, 5] = -1
    out, lse = sparse_attention(q, k, v, Selection(blocks, 4), return_lse=True, backend=backend)
    assert (out[:, 5] == 0).all()
    assert (lse[:, 5] == -math.inf).all()
    assert lse[:, :5].isfinite().all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, 5] == 0).all()


@every_backend
def test_future_keys_cannot_be_read(backend):
    q, k, v = qkv(1, 40, 40, 4, 2, 8, grad=True)
    selection = chosen(1, 40, 40, 2, 8, 3)
    spoilt_k, spoilt_v = k.detach().clone(), v.detach().clone()
    spoilt_k[:, 30] = math.nan  # within the block of queries 24 ... 29
    spoilt_v[:, 29:] = math.nan
    spoilt_k[:, 31:] = 1e4
    dout = seeded(1, 40, 4, 8, seed=3)
    dout[:, 29:] = 0
    clean, spoilt = (
        with_gradients(
            lambda q, k=k, v=v: sparse_attention(q, k, v, selection, backend=backend), (q,), dout
        )
        for k, v in ((k, v), (spoilt_k, spoilt_v))
    )
    for a, b in zip(clean, spoilt):
        torch.testing.assert_close(a[:, :29], b[:, :29])
    assert spoilt[0][:, 29:32].isnan().all()  # and those that do read it are told


@every_backend
def test_decoding_equals_the_full_pass(backend):
    q, k, v = qkv(2, 45, 45, 4, 2, 8, dtype=widest(backend))
    selection = chosen(2, 45, 45, 2, 4, 3)
    full = sparse_attention(q, k, v, selection, backend=backend)
    for end in (1, 4, 5, 44, 45):
        here = slice(end - 1, end)
        step = Selection(selection.blocks[:, :, here], 4)
        out = sparse_attention(q[:, here], k[:, :end], v[:, :end], step, backend=backend)
        torch.testing.assert_close(out, full[:, here])


@every_backend
def test_packed_equals_alone_with_gradients(backend):
    tq, sk = (7, 0, 20, 1, 3), (9, 4, 20, 12, 3)
    q, k, v = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=widest(backend), grad=True)
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    selection = chosen(1, sum(tq), sum(sk), 2, 4, 3, **packed)
    out, lse = sparse_attention(q, k, v, selection, return_lse=True, backend=backend, **packed)
    parts = zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1), selection.blocks.split(tq, 2))
    alone = [
        sparse_attention(*x, Selection(blocks, 4), return_lse=True, backend=backend)
        for *x, blocks in parts
    ]
    torch.testing.assert_close(out, torch.cat([x for x, _ in alone], 1))
    torch.testing.assert_close(lse, torch.cat([x for _, x in alone], 1))
    dout = seeded(*out.shape, seed=9, dtype=out.dtype)
    together = torch.autograd.grad(out, (q, k, v), dout)
    apart = torch.autograd.grad(torch.cat([x for x, _ in alone], 1), (q, k, v), dout)
    for a, b in zip(together, apart):
        torch.testing.assert_close(a, b)


@every_backend
def test_batch_order_does_not_matter(backend):
    q, k, v = qkv(3, 30, 30, 4, 2, 8)
    selection = chosen(3, 30, 30, 2, 4, 3)
    turned = [2, 0, 1]
    out = sparse_attention(q, k, v, selection, backend=backend)
    again = sparse_attention(
        q[turned], k[turned], v[turned], Selection(selection.blocks[turned], 4), backend=backend
    )
    torch.testing.assert_close(out[turned], again)


@every_backend
def test_each_head_uses_its_own_groups_selection(backend):
    q, k, v = qkv(1, 40, 40, 6, 3, 8)
    selection = chosen(1, 40, 40, 3, 4, 2)
    out = sparse_attention(q, k, v, selection, backend=backend)
    for head in range(6):
        group = head // 2
        alone = Selection(selection.blocks[:, [group]], 4)
        here = q[:, :, [head]], k[:, :, [group]], v[:, :, [group]]
        one = sparse_attention(*here, alone, backend=backend)
        torch.testing.assert_close(out[:, :, [head]], one)


@every_backend
def test_gradcheck(backend):
    inputs = qkv(1, 7, 9, 4, 2, 3, 2, dtype=widest(backend), grad=True)
    selection = chosen(1, 7, 9, 2, 3, 2)
    assert gradcheck(lambda *x: sparse_attention(*x, selection, backend=backend), inputs)


@every_backend
def test_strided_inputs_equal_contiguous_ones(backend):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 1, 50, 4, 2, 8))
    selection = chosen(2, 1, 50, 2, 4, 3)
    strided = sparse_attention(q, k, v, selection, backend=backend)
    plain = (x.contiguous() for x in (q, k, v))
    torch.testing.assert_close(strided, sparse_attention(*plain, selection, backend=backend))


@judged_backend
def test_repeats_bit_for_bit(backend):
    inputs = qkv(2, 60, 60, 4, 2, 8, dtype=torch.bfloat16, grad=True)
    selection = chosen(2, 60, 60, 2, 4, 3)
    dout = seeded(2, 60, 4, 8, seed=3, dtype=torch.bfloat16)
    runs = [
        with_gradients(lambda *x: sparse_attention(*x, selection, backend=backend), inputs, dout)
        for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@judged_backend
def test_more_than_two_to_the_31_keys(backend):
    """Token numbers pass int32; a copy of the keys or a [t, s] row would not fit here either."""
    block, s = 1 << 20, (1 << 31) + (3 << 20) + 5
    k = torch.zeros(1, 1, 1, 1).expand(1, s, 1, 1)
    v = torch.full((1, 1, 1, 1), 3.0).expand(1, s, 1, 1)
    own = s // block
    blocks = torch.tensor([[[[own - 1, own]]]], dtype=torch.int32)
    q, selection = torch.ones(1, 1, 1, 1), Selection(blocks, block)
    out, lse = sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    assert lse.item() == pytest.approx(math.log(block + s % block))
    assert out.item() == pytest.approx(3.0)
