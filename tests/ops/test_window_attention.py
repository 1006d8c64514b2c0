"""window_attention: softmax over the latest tokens and the first few, for every way it runs."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa import dense_attention
from openmsa.ops import workspace
from openmsa.ops.window_attention import window_attention
from tests.support import (
    assert_as_good_as_eager,
    borders,
    eager_attention,
    qkv,
    seeded,
)

every_backend = pytest.mark.parametrize("backend", ["reference", "portable"], indirect=True)


def read_by_place(t, s, window, sinks):
    """Which keys a query reads, written once more with loops: bool [1, 1, t, s]."""
    read = torch.zeros(t, s, dtype=torch.bool)
    for i in range(t):
        here = s - t + i
        for j in range(here + 1):
            read[i, j] = here - j < window or j < sinks
    return read[None, None]


def with_gradients(run, inputs, dout):
    out = run(*inputs)
    return (out, *torch.autograd.grad(out, inputs, dout))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "g", "d", "dv", "window", "sinks"),
    [
        (2, 67, 67, 8, 2, 16, 16, 9, 3),
        (1, 201, 201, 6, 3, 5, 7, 40, 0),
        (1, 133, 270, 4, 4, 16, 16, 31, 5),
        (2, 1, 131, 8, 2, 32, 32, 30, 2),
        (1, 90, 90, 4, 2, 8, 8, 1, 1),
    ],
)
def test_output_and_gradients_are_as_good_as_eager(
    backend, dtype, b, t, s, h, g, d, dv, window, sinks
):
    inputs = qkv(b, t, s, h, g, d, dv, dtype=dtype, grad=True)
    dout = seeded(b, t, h, dv, seed=7, dtype=dtype)
    read = read_by_place(t, s, window, sinks)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def ours(*x):
        return window_attention(*x, window=window, sinks=sinks, backend=backend)

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
def test_gradcheck(backend):
    inputs = qkv(1, 5, 9, 4, 2, 3, 2, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: window_attention(*x, window=3, sinks=1, backend=backend), inputs
    )


@every_backend
@pytest.mark.parametrize("t", [30, 7, 1])
def test_lse_is_the_logarithm_of_the_sum(backend, t):
    q, k, v = qkv(2, t, 30, 4, 2, 8, dtype=torch.float64)
    rule = {"window": 6, "sinks": 2, "scale": 0.7}
    lse = window_attention(q, k, v, **rule, return_lse=True, backend=backend)[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 0.7
    expected = scores.masked_fill(~read_by_place(t, 30, 6, 2), -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected.transpose(1, 2))


@every_backend
@pytest.mark.parametrize("rule", [{"window": 80}, {"window": 10**9}, {"window": 1, "sinks": 80}])
def test_a_window_of_everything_is_dense(backend, rule):
    inputs = qkv(2, 75, 80, 4, 2, 8, dtype=torch.float64, grad=True)
    dout = seeded(2, 75, 4, 8, seed=3, dtype=torch.float64)
    made = with_gradients(lambda *x: window_attention(*x, **rule, backend=backend), inputs, dout)
    dense = with_gradients(lambda *x: dense_attention(*x, backend="reference"), inputs, dout)
    for a, b in zip(made, dense):
        torch.testing.assert_close(a, b)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_what_is_read_can_spoil(backend, dtype):
    """Key 20 is read by queries 20 to 24, key 1 by all after it, key 60 by 60 to 64."""
    q, k, v = qkv(1, 90, 90, 4, 2, 8, dtype=dtype, grad=True)
    spoilt_k, spoilt_v = k.detach().clone(), v.detach().clone()
    spoilt_k[:, 20] = math.nan
    spoilt_v[:, 60, 1] = math.inf
    rule = {"window": 5, "sinks": 2, "backend": backend}
    dout = seeded(1, 90, 4, 8, seed=3, dtype=dtype)
    dout[:, 20:25] = dout[:, 60:65] = 0
    clean, spoilt = (
        with_gradients(lambda q, k=k, v=v: window_attention(q, k, v, **rule), (q,), dout)
        for k, v in ((k, v), (spoilt_k, spoilt_v))
    )
    others = [i for i in range(90) if not (20 <= i < 25 or 60 <= i < 65)]
    for a, b in zip(clean, spoilt):
        torch.testing.assert_close(a[:, others], b[:, others])
    assert spoilt[0][:, 20:25].isnan().all()
    assert spoilt[0][:, 60:65, 2:].isnan().all()
    torch.testing.assert_close(clean[0][:, 60:65, :2], spoilt[0][:, 60:65, :2])


@every_backend
def test_decoding_equals_the_full_pass(backend):
    q, k, v = qkv(2, 145, 145, 4, 2, 8, dtype=torch.float64)
    rule = {"window": 11, "sinks": 3, "backend": backend}
    full = window_attention(q, k, v, **rule)
    for start, end in ((0, 1), (4, 5), (144, 145), (13, 129)):
        out = window_attention(q[:, start:end], k[:, :end], v[:, :end], **rule)
        torch.testing.assert_close(out, full[:, start:end])


@every_backend
def test_packed_equals_alone_with_gradients(backend):
    tq, sk = (7, 0, 80, 1, 3), (9, 4, 80, 12, 3)
    q, k, v = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=torch.float64, grad=True)
    rule = {"window": 5, "sinks": 2, "return_lse": True, "backend": backend}
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    out, lse = window_attention(q, k, v, **rule, **packed)
    alone = [
        window_attention(*x, **rule) for x in zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1))
    ]
    apart = torch.cat([x for x, _ in alone], 1)
    torch.testing.assert_close(out, apart)
    torch.testing.assert_close(lse, torch.cat([x for _, x in alone], 1))
    dout = seeded(*out.shape, seed=9, dtype=out.dtype)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, apart))):
        torch.testing.assert_close(a, b)


def test_small_pieces_give_the_same(monkeypatch):
    inputs = qkv(1, 150, 150, 4, 2, 8, dtype=torch.float64, grad=True)
    dout = seeded(1, 150, 4, 8, seed=3, dtype=torch.float64)

    def run(*x):
        return window_attention(*x, window=17, sinks=4, backend="portable")

    usual = with_gradients(run, inputs, dout)
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1 << 12)
    for a, b in zip(usual, with_gradients(run, inputs, dout)):
        torch.testing.assert_close(a, b)


def test_no_operation_allocates_a_matrix_of_the_problem(monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1 << 20)
    q, k, v = qkv(1, 2048, 2048, 4, 2, 4, grad=True)

    def run():
        window_attention(q, k, v, window=100, sinks=4, backend="portable").sum().backward()

    run()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    largest = max(event.self_cpu_memory_usage for event in profile.function_events)
    assert largest < 2048 * 2048 / 4


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_operator_is_registered_as_torch_asks(packed):
    q, k, v = qkv(1, 9, 11, 4, 2, 3, grad=True)
    where = (borders(4, 5), borders(5, 6)) if packed else (None, None)
    operator = torch.ops.openmsa.portable_window_attention.default
    torch.library.opcheck(operator, (q, k, v, 3, 1, 0.5, *where))


def test_other_backends_run_the_portable_code():
    q, k, v = qkv(1, 20, 20, 4, 2, 8)
    ours = window_attention(q, k, v, window=4, backend="portable")
    assert torch.equal(window_attention(q, k, v, window=4), ours)
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        window_attention(q, k, v, window=4, backend="cuda")


def test_repeats_bit_for_bit():
    inputs = qkv(2, 200, 200, 4, 2, 8, dtype=torch.bfloat16, grad=True)
    dout = seeded(2, 200, 4, 8, seed=3, dtype=torch.bfloat16)
    runs = [
        with_gradients(lambda *x: window_attention(*x, window=9, sinks=2), inputs, dout)
        for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@every_backend
def test_no_queries(backend):
    q, k, v = qkv(2, 0, 5, 4, 2, 8)
    assert window_attention(q, k, v, window=2, backend=backend).shape == (2, 0, 4, 8)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"window": 2.5}, "window must be"),
        ({"window": 2, "sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
        ({"window": 2, "scale": math.inf}, "scale must be a finite number"),
    ],
)
def test_refuses(rule, message):
    with pytest.raises(ValueError, match=message):
        window_attention(*qkv(1, 5, 5, 4, 2, 8), **rule)


def test_refuses_more_queries_than_keys():
    with pytest.raises(ValueError, match="6 query tokens cannot be the last of 5"):
        window_attention(*qkv(1, 6, 5, 4, 2, 8), window=2)
