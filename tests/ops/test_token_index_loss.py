"""token_index_loss: what DeepSeek's indexer learns, value and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa import Selection
from openmsa.ops import workspace
from openmsa.ops.token_selection import select_tokens, token_index_loss
from tests.ops.test_memory import largest_allocation
from tests.support import assert_as_good_as_eager, borders, readable, seeded

both_codes = pytest.mark.parametrize("backend", ["reference", "portable"])


def tensors(b, t, s, h, g, d, heads, d_index, *, dtype=torch.float64, seed=0):
    """q, k; then q_index, k_index and head_weights, which are taught."""
    shapes = ((b, t, h, d), (b, s, g, d), (b, t, heads, d_index), (b, s, d_index), (b, t, heads))
    made = [seeded(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]
    return [x.requires_grad_(i > 1) for i, x in enumerate(made)]


def eager(q, k, q_index, k_index, head_weights, read, scale, index_scale):
    """What eager torch computes in the dtype of its inputs; read [b, 1, t, s]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * scale
    teacher = scores.masked_fill(~read, -math.inf).softmax(-1).sum(1)
    teacher = (teacher / teacher.sum(-1, keepdim=True)).detach()
    heads = (q_index.transpose(1, 2) @ k_index.mT[:, None]).relu()
    student = (head_weights.transpose(1, 2)[..., None] * heads).sum(1) * index_scale
    student = student.masked_fill(~read[:, 0], -math.inf).log_softmax(-1)
    student = student.masked_fill(~read[:, 0], 0)
    return (torch.xlogy(teacher, teacher) - teacher * student).sum(-1).mean()


def with_gradients(run, inputs):
    loss = run(*inputs)
    return (loss, *torch.autograd.grad(loss, inputs[2:]))


@both_codes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", ["selected", "prefix"])
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "g", "heads", "top_k"),
    [(2, 33, 33, 4, 2, 3, 7), (1, 21, 40, 6, 1, 2, 9), (2, 5, 50, 4, 2, 8, 12)],
)
def test_value_and_gradients_are_as_good_as_eager(
    backend, dtype, support, b, t, s, h, g, heads, top_k
):
    inputs = tensors(b, t, s, h, g, 8, heads, 5, dtype=dtype, seed=42)
    selection = None
    if support == "selected":
        selection = select_tokens(*inputs[2:], top_k=top_k)
    read = readable(t, s, None if selection is None else selection.blocks, 1)
    read = read.expand(b, 1, t, s)
    exact = [x.detach().double().requires_grad_(i > 1) for i, x in enumerate(inputs)]
    scales = 8**-0.5, 0.7

    def ours(*x):
        how = {"index_scale": 0.7, "backend": backend}
        return token_index_loss(*x, selection, **how)

    results = (
        with_gradients(ours, inputs),
        with_gradients(lambda *x: eager(*x, read, *scales), inputs),
        with_gradients(lambda *x: eager(*x, read, *scales), exact),
    )
    for what, *three in zip(("loss", "dq", "dk", "dw"), *results):
        assert_as_good_as_eager(*three, what=what)


@both_codes
@pytest.mark.parametrize("support", ["selected", "prefix"])
def test_packed_and_weighted_equals_each_alone(backend, support):
    tq, sk = (7, 0, 12, 1), (9, 4, 12, 12)
    inputs = tensors(1, sum(tq), sum(sk), 4, 2, 6, 3, 5)
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    weights = seeded(1, sum(tq), seed=9, dtype=torch.float64).abs()
    weights[0, 3] = 0
    selection = None
    if support == "selected":
        selection = select_tokens(*inputs[2:], top_k=4, **packed)
    how = {"backend": backend}
    made = token_index_loss(*inputs, selection, row_weights=weights, **packed, **how)
    lengths = (tq, sk, tq, sk, tq)
    parts = zip(*(x.split(n, 1) for x, n in zip(inputs, lengths)), weights.split(tq, 1))
    chosen = [None] * 4 if selection is None else selection.blocks.split(tq, 2)
    total = 0
    for (*part, own), blocks in zip(parts, chosen):
        one = None if blocks is None else Selection(blocks, 1)
        total += own.sum() * token_index_loss(*part, one, row_weights=own, **how)
    expected = total / weights.sum()
    torch.testing.assert_close(made, expected)
    gradients = (torch.autograd.grad(x, inputs[2:]) for x in (made, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@both_codes
def test_only_the_index_is_taught(backend):
    inputs = [x.requires_grad_() for x in tensors(1, 9, 9, 2, 1, 4, 2, 3)]
    loss = token_index_loss(*inputs, select_tokens(*inputs[2:], top_k=4), backend=backend)
    given = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert [x is not None for x in given] == [False, False, True, True, True]


@both_codes
def test_queries_without_a_key_and_weights_of_zero_count_nothing(backend):
    inputs = tensors(1, 9, 9, 2, 1, 4, 2, 3)
    selection = select_tokens(*inputs[2:], top_k=4)
    selection.blocks[:, :, 5] = -1
    seen = torch.ones(1, 9, dtype=torch.float64)
    seen[:, 5] = 0
    all_rows = token_index_loss(*inputs, selection, backend=backend)
    without = token_index_loss(*inputs, selection, row_weights=seen, backend=backend)
    torch.testing.assert_close(all_rows * 9, without * 8)
    assert all(x.isfinite().all() for x in torch.autograd.grad(all_rows, inputs[2:]))
    nothing = token_index_loss(*inputs, selection, row_weights=seen * 0, backend=backend)
    assert nothing == 0
    assert all((x == 0).all() for x in torch.autograd.grad(nothing, inputs[2:]))


@both_codes
def test_keys_of_the_future_cannot_be_read(backend):
    inputs = tensors(1, 12, 12, 2, 1, 4, 2, 3)
    spoilt = [x.detach().clone() for x in inputs]
    for x in (spoilt[1], spoilt[3]):
        x[:, 9:] = 1e4
    early = (torch.arange(12) < 9).double()[None]
    for selection in (None, select_tokens(*inputs[2:], top_k=4)):
        how = {"row_weights": early, "backend": backend}
        losses = [token_index_loss(*x, selection, **how) for x in (inputs, spoilt)]
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize("support", ["selected", "prefix"])
def test_pieces_and_slices_of_heads_change_nothing(support, monkeypatch):
    inputs = tensors(2, 40, 40, 4, 2, 6, 5, 3)
    selection = select_tokens(*inputs[2:], top_k=9) if support == "selected" else None
    whole = with_gradients(lambda *x: token_index_loss(*x, selection), inputs)
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1 << 11)
    monkeypatch.setattr(workspace, "CACHE_BYTES", 1 << 11)
    cut = with_gradients(lambda *x: token_index_loss(*x, selection), inputs)
    for a, b in zip(whole, cut):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("support", ["selected", "prefix"])
def test_gradcheck_and_memory(support, monkeypatch):
    inputs = tensors(1, 6, 8, 2, 1, 3, 2, 3)
    selection = select_tokens(*inputs[2:], top_k=4) if support == "selected" else None
    assert torch.autograd.gradcheck(
        lambda *x: token_index_loss(*inputs[:2], *x, selection, backend="portable"), inputs[2:]
    )
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1 << 20)
    monkeypatch.setattr(workspace, "CACHE_BYTES", 1 << 20)
    inputs = tensors(1, 2048, 2048, 2, 1, 4, 2, 4, dtype=torch.float32)
    selection = select_tokens(*inputs[2:], top_k=8) if support == "selected" else None
    largest = largest_allocation(
        lambda: token_index_loss(*inputs, selection, backend="portable").backward()
    )
    assert largest < 2048 * 2048 / 2


def test_refusals():
    q, k, q_index, k_index, head_weights = (x.detach() for x in tensors(1, 8, 8, 2, 1, 4, 2, 3))
    with pytest.raises(ValueError, match="q_index must have the"):
        token_index_loss(q, k, q_index[:, 1:], k_index, head_weights[:, 1:])
    with pytest.raises(ValueError, match="k_index must have the"):
        token_index_loss(q, k, q_index, k_index[:, 1:], head_weights)
    with pytest.raises(ValueError, match="head_weights must have shape"):
        token_index_loss(q, k, q_index, k_index, head_weights[..., :1])
    two = Selection(torch.zeros(1, 2, 8, 3, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="must have 1 groups"):
        token_index_loss(q, k, q_index, k_index, head_weights, two)
