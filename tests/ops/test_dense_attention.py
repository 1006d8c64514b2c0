"""dense_attention: causal softmax attention, for every backend and every way it is computed."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa import dense_attention
from tests.support import (
    assert_as_good_as_eager,
    borders,
    eager_attention,
    every_backend,
    gradcheck,
    judged_backend,
    qkv,
    readable,
    seeded,
    widest,
)


def with_gradients(run, inputs, dout):
    out = run(*inputs)
    return (out, *torch.autograd.grad(out, inputs, dout))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "g", "d", "dv"),
    [
        (2, 67, 67, 8, 2, 16, 16),
        (1, 67, 67, 6, 3, 5, 7),
        (1, 40, 40, 64, 2, 8, 6),
        (1, 33, 70, 4, 4, 16, 16),
        (2, 1, 131, 8, 2, 32, 32),
    ],
)
def test_output_and_gradients_are_as_good_as_eager(backend, dtype, b, t, s, h, g, d, dv):
    inputs = qkv(b, t, s, h, g, d, dv, dtype=dtype, grad=True)
    dout = seeded(b, t, h, dv, seed=7, dtype=dtype)
    read = readable(t, s, None, 1)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def eager(*x):
        return eager_attention(*x, read, d**-0.5)

    results = (
        with_gradients(lambda *x: dense_attention(*x, backend=backend), inputs, dout),
        with_gradients(eager, inputs, dout),
        with_gradients(eager, exact, dout.double()),
    )
    for what, *three in zip(("out", "dq", "dk", "dv"), *results):
        assert_as_good_as_eager(*three, what=what)


@every_backend
@pytest.mark.parametrize(("t", "s", "dtype"), [(30, 30, torch.float32), (7, 30, "widest")])
def test_lse_is_the_logarithm_of_the_sum(backend, t, s, dtype):
    dtype = widest(backend) if dtype == "widest" else dtype
    q, k, v = qkv(2, t, s, 4, 2, 8, dtype=dtype)
    lse = dense_attention(q, k, v, return_lse=True, backend=backend, scale=0.7)[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 0.7
    expected = scores.masked_fill(~readable(t, s, None, 1), -math.inf).logsumexp(-1)
    assert lse.dtype == dtype
    torch.testing.assert_close(lse, expected.transpose(1, 2))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, "widest", torch.bfloat16])
def test_future_keys_cannot_be_read(backend, dtype):
    """fp32 takes torch's fused attention in portable, fp64 our own."""
    dtype = widest(backend) if dtype == "widest" else dtype
    q, k, v = qkv(1, 40, 40, 4, 2, 8, dtype=dtype, grad=True)
    spoilt_k, spoilt_v = k.detach().clone(), v.detach().clone()
    spoilt_k[:, 30, 0] = math.nan
    spoilt_v[:, 32] = math.inf
    spoilt_k[:, 31:] *= 100
    dout = seeded(1, 40, 4, 8, seed=3, dtype=dtype)
    dout[:, 30:] = 0
    clean, spoilt = (
        with_gradients(lambda q, k=k, v=v: dense_attention(q, k, v, backend=backend), (q,), dout)
        for k, v in ((k, v), (spoilt_k, spoilt_v))
    )
    for a, b in zip(clean, spoilt):
        torch.testing.assert_close(a[:, :30], b[:, :30])
    assert spoilt[0][:, 30:, :2].isnan().all()
    assert not spoilt[0][:, :32, 2:].isnan().any()


@every_backend
def test_decoding_equals_the_full_pass(backend):
    q, k, v = qkv(2, 45, 45, 4, 2, 8, dtype=widest(backend))
    full = dense_attention(q, k, v, backend=backend)
    for start, end in ((0, 1), (4, 5), (44, 45), (13, 29)):
        out = dense_attention(q[:, start:end], k[:, :end], v[:, :end], backend=backend)
        torch.testing.assert_close(out, full[:, start:end])


@every_backend
def test_packed_equals_alone_with_gradients(backend):
    tq, sk = (7, 0, 20, 1, 3), (9, 4, 20, 12, 3)
    q, k, v = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=widest(backend), grad=True)
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    out, lse = dense_attention(q, k, v, return_lse=True, backend=backend, **packed)
    alone = [
        dense_attention(*x, return_lse=True, backend=backend)
        for x in zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1))
    ]
    apart = torch.cat([x for x, _ in alone], 1)
    torch.testing.assert_close(out, apart)
    torch.testing.assert_close(lse, torch.cat([x for _, x in alone], 1))
    dout = seeded(*out.shape, seed=9, dtype=out.dtype)
    grads = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, apart))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@every_backend
def test_gradcheck(backend):
    inputs = qkv(1, 5, 7, 4, 2, 3, 2, dtype=widest(backend), grad=True)
    assert gradcheck(lambda *x: dense_attention(*x, backend=backend), inputs)


@every_backend
def test_no_queries(backend):
    q, k, v = qkv(2, 0, 5, 4, 2, 8)
    assert dense_attention(q, k, v, backend=backend).shape == (2, 0, 4, 8)


@judged_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, "widest"])
def test_repeats_bit_for_bit(backend, dtype):
    dtype = widest(backend) if dtype == "widest" else dtype
    inputs = qkv(2, 60, 60, 4, 2, 8, dtype=dtype, grad=True)
    dout = seeded(2, 60, 4, 8, seed=3, dtype=dtype)
    runs = [
        with_gradients(lambda *x: dense_attention(*x, backend=backend), inputs, dout) for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
