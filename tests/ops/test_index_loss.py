"""index_loss: its value, its gradients, and what must not move it, for every backend."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa import Selection, dense_attention, index_loss, select_blocks, sparse_attention
from tests.support import (
    assert_as_good_as_eager,
    borders,
    eager_loss,
    every_backend,
    gradcheck,
    index_qk,
    judged_backend,
    qkv,
    readable,
    widest,
)

both_supports = pytest.mark.parametrize("sparse", [True, False], ids=["blocks", "prefix"])


def inputs(b, t, s, h, g, d, d_index, dtype):
    q, k, _ = qkv(b, t, s, h, g, d, dtype=dtype, grad=True)
    return (q, k, *index_qk(b, t, s, g, d_index, dtype=dtype, grad=True))


def selected(q_index, k_index, block_size=4, top_k=3, **packed):
    rule = {"block_size": block_size, "top_k": top_k, "backend": "portable", **packed}
    return select_blocks(q_index, k_index, **rule)


@every_backend
def test_worked_vector_of_the_paper(backend):
    """reference/paper.md 2.8: 8 tokens, blocks of 2, blocks 1 and 2 selected, two heads."""
    dtype = widest(backend)
    heads = torch.tensor(
        [
            [0.02, 0.03, 0.10, 0.05, 0.30, 0.20, 0.15, 0.15],
            [0.04, 0.02, 0.04, 0.02, 0.40, 0.28, 0.10, 0.10],
        ],
        dtype=dtype,
    )
    student = torch.tensor([0.23247, 0.04247, 0.46814, 0.25692], dtype=dtype)
    # One channel per key: the query then is the logarithm of its weights.
    k = torch.eye(8, dtype=dtype)[None, :, None]
    q = heads.log()[None, None]
    q_index = torch.zeros(1, 1, 1, 8, dtype=dtype)
    q_index[..., 2:6] = student.log()
    selection = Selection(torch.tensor([[[[1, 2]]]], dtype=torch.int32), 2)
    loss = index_loss(
        q, k, q_index, k[:, :, 0], selection, scale=1.0, index_scale=1.0, backend=backend
    )
    assert loss.item() == pytest.approx(0.06002, abs=2e-5)
    averaged_first = heads.mean(0)[2:6] / heads.mean(0)[2:6].sum()
    wrong = (averaged_first * (averaged_first / student).log()).sum().item()
    assert abs(loss.item() - wrong) > 1e-4  # this loss can tell the two orders apart


@every_backend
@both_supports
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "g", "d", "d_index"),
    [(2, 41, 41, 8, 2, 16, 16), (1, 23, 50, 6, 3, 5, 7), (2, 1, 61, 4, 2, 8, 8)],
)
def test_value_and_gradients_are_as_good_as_eager(
    backend, sparse, dtype, b, t, s, h, g, d, d_index
):
    q, k, q_index, k_index = inputs(b, t, s, h, g, d, d_index, dtype)
    selection = selected(q_index, k_index) if sparse else None
    read = readable(t, s, selection.blocks if sparse else None, 4)
    exact = [x.detach().double().requires_grad_() for x in (q, k, q_index, k_index)]

    def eager(*x):
        loss = eager_loss(*x, read, d**-0.5, d_index**-0.5)
        return (loss, *torch.autograd.grad(loss, x[2:]))

    loss = index_loss(q, k, q_index, k_index, selection, backend=backend)
    ours = (loss, *torch.autograd.grad(loss, (q_index, k_index)))
    results = (ours, eager(q, k, q_index, k_index), eager(*exact))
    for what, *three in zip(("loss", "dq_index", "dk_index"), *results):
        assert_as_good_as_eager(*three, what=what)


@every_backend
@both_supports
def test_gradient_reaches_the_index_and_nothing_else(backend, sparse):
    q, k, q_index, k_index = inputs(1, 20, 20, 4, 2, 8, 8, widest(backend))
    selection = selected(q_index, k_index) if sparse else None
    loss = index_loss(q, k, q_index, k_index, selection, backend=backend)
    gradients = torch.autograd.grad(loss, (q, k, q_index, k_index), allow_unused=True)
    assert gradients[0] is None
    assert gradients[1] is None
    assert gradients[2].abs().max() > 0
    assert gradients[3].abs().max() > 0


@every_backend
@both_supports
def test_is_zero_where_the_index_is_the_attention(backend, sparse):
    q, k, _ = qkv(2, 30, 30, 2, 2, 8, dtype=widest(backend))
    k = k[:, :, :1].expand(-1, -1, 2, -1)
    q_index, k_index = q.clone().requires_grad_(), k[:, :, 0].clone().requires_grad_()
    selection = selected(q_index, k_index) if sparse else None
    loss = index_loss(q, k, q_index, k_index, selection, backend=backend)
    nothing = 1e-12 if q.dtype == torch.float64 else 1e-6
    assert abs(loss.item()) < nothing
    for gradient in torch.autograd.grad(loss, (q_index, k_index)):
        assert gradient.abs().max() < nothing


@every_backend
@both_supports
def test_row_weights_average_over_what_they_weigh(backend, sparse):
    tensors = inputs(2, 20, 20, 4, 2, 8, 8, widest(backend))
    selection = selected(*tensors[2:]) if sparse else None
    weights = torch.zeros(2, 20)
    weights[0, 3], weights[1, 17] = 1.0, 3.0
    loss = index_loss(*tensors, selection, row_weights=weights, backend=backend)

    def one_row(b, t):
        one = torch.zeros(2, 20)
        one[b, t] = 0.5
        return index_loss(*tensors, selection, row_weights=one, backend=backend)

    torch.testing.assert_close(loss, (one_row(0, 3) + 3 * one_row(1, 17)) / 4)
    sevens = torch.full((2, 20), 7.0)
    every_row = index_loss(*tensors, selection, row_weights=sevens, backend=backend)
    torch.testing.assert_close(every_row, index_loss(*tensors, selection, backend=backend))
    gradient = torch.autograd.grad(loss, tensors[2])[0]
    assert gradient.abs().sum((2, 3)).nonzero().tolist() == [[0, 3], [1, 17]]


@every_backend
@both_supports
def test_weights_of_zero_give_zero(backend, sparse):
    tensors = inputs(1, 20, 20, 4, 2, 8, 8, widest(backend))
    selection = selected(*tensors[2:]) if sparse else None
    loss = index_loss(*tensors, selection, row_weights=torch.zeros(1, 20), backend=backend)
    assert loss.item() == 0
    assert all((x == 0).all() for x in torch.autograd.grad(loss, tensors[2:]))


@every_backend
def test_query_without_keys_adds_nothing_but_counts(backend):
    tensors = inputs(1, 8, 8, 2, 1, 4, 4, widest(backend))
    blocks = torch.tensor([0, 1], dtype=torch.int32).expand(1, 1, 8, 2).contiguous()
    whole = index_loss(*tensors, Selection(blocks, 4), backend=backend)
    last = torch.zeros(1, 8)
    last[:, 7] = 1
    share = index_loss(*tensors, Selection(blocks, 4), row_weights=last, backend=backend) / 8
    blocks[:, :, 7] = -1
    without = index_loss(*tensors, Selection(blocks, 4), backend=backend)
    torch.testing.assert_close(without, whole - share)
    assert all(x.isfinite().all() for x in torch.autograd.grad(without, tensors[2:]))


@every_backend
@both_supports
def test_lse_of_attention_changes_nothing(backend, sparse):
    tensors = inputs(2, 20, 26, 4, 2, 8, 8, torch.float32)
    q, k, q_index, k_index = tensors
    selection = selected(q_index, k_index) if sparse else None
    if sparse:
        lse = sparse_attention(q, k, k, selection, return_lse=True, backend=backend)[1]
    else:
        lse = dense_attention(q, k, k, return_lse=True, backend=backend)[1]
    with_lse = index_loss(*tensors, selection, lse=lse, backend=backend)
    torch.testing.assert_close(with_lse, index_loss(*tensors, selection, backend=backend))


@every_backend
@both_supports
def test_packed_equals_alone(backend, sparse):
    tq, sk = (7, 0, 20, 1, 3), (9, 4, 20, 12, 3)
    q, k, q_index, k_index = inputs(1, sum(tq), sum(sk), 4, 2, 8, 8, widest(backend))
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    selection = selected(q_index, k_index, **packed) if sparse else None
    together = index_loss(q, k, q_index, k_index, selection, backend=backend, **packed)
    total = 0
    for i, parts in enumerate(
        zip(q.split(tq, 1), k.split(sk, 1), q_index.split(tq, 1), k_index.split(sk, 1))
    ):
        if tq[i]:
            own = selected(*parts[2:]) if sparse else None
            total = total + tq[i] * index_loss(*parts, own, backend=backend)
    alone = total / sum(tq)
    torch.testing.assert_close(together, alone)
    grads = (torch.autograd.grad(x, (q_index, k_index)) for x in (together, alone))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@every_backend
@both_supports
def test_future_keys_cannot_be_read(backend, sparse):
    q, k, q_index, k_index = inputs(1, 40, 40, 4, 2, 8, 8, widest(backend))
    selection = selected(q_index, k_index, 8) if sparse else None
    weights = (torch.arange(40) < 29).float()[None]
    spoilt_k, spoilt_index = k.detach().clone(), k_index.detach().clone()
    spoilt_k[:, 30:] = math.nan
    spoilt_index[:, 29:31] = 1e3
    run = {"row_weights": weights, "backend": backend}
    clean = index_loss(q, k, q_index, k_index, selection, **run)
    # Rows that see the spoilt keys weigh nothing but would be NaN, so they are left out.
    q, q_index = q[:, :29], q_index[:, :29]
    if sparse:
        selection = Selection(selection.blocks[:, :, :29], 8)
    seen = [x[:, :29] for x in (spoilt_k, spoilt_index)]
    spoilt = index_loss(q, seen[0], q_index, seen[1], selection, backend=backend)
    torch.testing.assert_close(clean, spoilt)


@every_backend
@both_supports
def test_gradcheck(backend, sparse):
    q, k, q_index, k_index = inputs(1, 5, 7, 4, 2, 3, 3, widest(backend))
    selection = selected(q_index, k_index, 3, 2) if sparse else None
    assert gradcheck(
        lambda *x: index_loss(q, k, *x, selection, backend=backend), (q_index, k_index)
    )


@judged_backend
@both_supports
def test_repeats_bit_for_bit(backend, sparse):
    tensors = inputs(2, 40, 40, 4, 2, 8, 8, torch.bfloat16)
    selection = selected(*tensors[2:]) if sparse else None
    runs = []
    for _ in "ab":
        loss = index_loss(*tensors, selection, backend=backend)
        runs.append((loss, *torch.autograd.grad(loss, tensors[2:])))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
