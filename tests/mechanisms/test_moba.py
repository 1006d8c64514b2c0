"""MoBA: one softmax per query head over its own and its chosen blocks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from openmsa import dense_attention
from openmsa.mechanisms.moba import MoBAConfig, moba_attention, select
from openmsa.ops.pooled_selection import mean_pool
from tests.support import (
    CPU,
    assert_as_good_as_eager,
    borders,
    eager_attention,
    every_backend,
    judged_backend,
    qkv,
    readable,
    widest,
)

CONFIG = MoBAConfig(block_size=4, top_k=3)


def from_the_equations(q, k, v, block_size, top_k):
    """The paper's equations, one query and head at a time, in fp64; gradients by autograd."""
    (b, t, h, d), (s, g) = q.shape, k.shape[1:3]
    rows = []
    for i, x, head in torch.cartesian_prod(*map(torch.arange, (b, t, h))).tolist():
        position, group = s - t + x, head // (h // g)
        own = position // block_size
        gate = [
            (q[i, x, head] @ k[i, n * block_size : (n + 1) * block_size, group].mean(0)).item()
            for n in range(own)
        ]
        best = sorted(range(own), key=lambda n: -gate[n])[: top_k - 1]
        read = [j for j in range(position + 1) if j // block_size in {own, *best}]
        weights = (k[i, read, group] @ q[i, x, head] / d**0.5).softmax(0)
        rows.append(weights @ v[i, read, group])
    return torch.stack(rows).view(b, t, h, -1)


@every_backend
@pytest.mark.parametrize(("t", "s", "top_k"), [(30, 30, 3), (9, 27, 2), (21, 21, 1)])
def test_is_the_paper_with_gradients(backend, t, s, top_k):
    """top_k=1 is attention within blocks, as in the paper."""
    inputs = qkv(2, t, s, 4, 2, 8, dtype=widest(backend), grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    config = MoBAConfig(block_size=4, top_k=top_k)
    made, truth = (
        moba_attention(*inputs, config, backend=backend).out,
        from_the_equations(*exact, 4, top_k),
    )
    torch.testing.assert_close(made.double(), truth, atol=1e-5, rtol=1e-5)
    slope = torch.linspace(-1, 1, truth.numel(), dtype=torch.float64).view_as(truth)
    made.backward(slope.to(made.dtype))
    truth.backward(slope)
    for ours, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


@judged_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_good_as_eager(backend, dtype):
    q, k, v = qkv(1, 200, 200, 4, 2, 16, dtype=dtype, grad=True)
    config = MoBAConfig(block_size=16, top_k=4)
    made = moba_attention(q, k, v, config, backend=backend)
    read = readable(200, 200, made.selection.blocks, 16)
    results = []
    for kind in (dtype, torch.float64):
        inputs = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        out = eager_attention(*inputs, read, 0.25)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    ours = (made.out, *torch.autograd.grad(made.out.sum(), (q, k, v)))
    for x, eager, truth, name in zip(ours, *results, ("out", "dq", "dk", "dv"), strict=True):
        assert_as_good_as_eager(x, eager, truth, name)


@every_backend
def test_heads_choose_for_themselves_and_always_their_own_block(backend):
    q, k, _ = qkv(1, 64, 64, 4, 2, 8, dtype=widest(backend))
    blocks = select(CONFIG, q, k, backend=backend).blocks
    assert blocks.shape == (1, 4, 64, 3)
    own = torch.arange(64) // 4
    assert (blocks == own[:, None]).any(-1).all()
    assert (blocks <= own[:, None]).all()
    assert not torch.equal(blocks[:, 0], blocks[:, 1])  # two heads of one group


@every_backend
def test_keeping_every_block_is_dense_and_few_are_not(backend):
    q, k, v = qkv(2, 37, 37, 4, 2, 8, dtype=widest(backend))
    dense = moba_attention(q, k, v, CONFIG, phase="dense", backend=backend)
    assert dense.selection is None and dense.index_loss is None
    torch.testing.assert_close(dense.out, dense_attention(q, k, v))
    every = moba_attention(q, k, v, MoBAConfig(4, 10), backend=backend)
    torch.testing.assert_close(every.out, dense.out)
    torch.testing.assert_close(every.lse, dense.lse)
    few = moba_attention(q, k, v, CONFIG, backend=backend).out
    torch.testing.assert_close(few[:, :12], dense.out[:, :12])
    assert (few[:, 16:] - dense.out[:, 16:]).abs().amax((0, 2, 3)).min() > 1e-3


@every_backend
def test_packed_is_each_alone_and_decoding_the_full_pass(backend):
    tq, sk = (20, 3, 1), (20, 17, 30)
    q, k, v = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=widest(backend))
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    together = moba_attention(q, k, v, CONFIG, **packed, backend=backend).out
    for one, alone_q, alone_k, alone_v in zip(
        together.split(tq, 1), q.split(tq, 1), k.split(sk, 1), v.split(sk, 1)
    ):
        alone = moba_attention(alone_q, alone_k, alone_v, CONFIG, backend=backend).out
        torch.testing.assert_close(one, alone)


@every_backend
def test_blocks_already_pooled_choose_alike(backend):
    tq, sk = (20, 3, 1), (20, 17, 30)
    q, k, v = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=widest(backend))
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    for where in (packed, {}):
        k_pooled, _ = mean_pool(k, kernel=4, stride=4, cu_seqlens_k=where.get("cu_seqlens_k"))
        how = {**where, "backend": backend}
        made = moba_attention(q, k, v, CONFIG, **how)
        given = moba_attention(q, k, v, CONFIG, k_pooled=k_pooled, **how)
        assert torch.equal(given.selection.blocks, made.selection.blocks)
        assert torch.equal(given.out, made.out)
    other = moba_attention(q, k, v, CONFIG, k_pooled=k_pooled.flip(1), backend=backend)
    assert not torch.equal(other.selection.blocks, made.selection.blocks)
    with pytest.raises(ValueError, match="k_pooled has 15 windows, but 67 keys have 16"):
        moba_attention(q, k, v, CONFIG, k_pooled=k_pooled[:, 1:], backend=backend)


@pytest.mark.parametrize("block_size", [16, 48, 4096])
@pytest.mark.parametrize("backend", ["reference", "portable", *CPU], indirect=True)
def test_blocks_of_any_size(backend, block_size):
    """The last queries choose one of two whole blocks, and read some keys of their own."""
    s, t = 2 * block_size + 21 - block_size % 5, 3
    inputs = qkv(1, t, s, 2, 1, 8, dtype=widest(backend), grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = moba_attention(*inputs, MoBAConfig(block_size, 2), backend=backend).out
    truth = from_the_equations(*exact, block_size, 2)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    truth.sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


@judged_backend
@pytest.mark.parametrize(("block_size", "top_k"), [(32, 3), (16, 1)])
def test_is_the_official_naive_code(backend, block_size, top_k):
    """Runs where the folder moba of github.com/MoonshotAI/MoBA is on PYTHONPATH. That code computes
    in fp32 whatever it is given, and wants a key for every query head."""
    official = pytest.importorskip("moba_naive").moba_attn_varlen_naive
    lengths, h, g = (150, 77, 200), 4, 2
    inputs = qkv(1, sum(lengths), sum(lengths), h, g, 16, grad=True)
    cu, config = borders(*lengths), MoBAConfig(block_size, top_k)
    out = moba_attention(*inputs, config, cu_seqlens_q=cu, backend=backend).out
    q, k, v = inputs
    heads = (x[0].repeat_interleave(h // g, 1) for x in (k, v))
    theirs = official(q[0], *heads, cu, max(lengths), block_size, top_k)[None]
    torch.testing.assert_close(out, theirs)
    slope = torch.linspace(-1, 1, out.numel()).view_as(out)
    gradients = (torch.autograd.grad(x, inputs, slope) for x in (out, theirs))
    for ours, other in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, other)


def test_config_is_the_papers_by_default_and_frozen():
    config = MoBAConfig(layers=[2, 0])
    assert (config.block_size, config.top_k, config.layers) == (4096, 12, (0, 2))
    assert MoBAConfig(**dataclasses.asdict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"layers": (1, 1)}, "name each layer once"),
        ({"layers": 3}, "layers must be a list"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        MoBAConfig(**fields)


def test_there_is_no_warmup():
    with pytest.raises(ValueError, match="phase must be one of dense, sparse, got 'warmup'"):
        moba_attention(*qkv(1, 4, 4, 2, 1, 4), CONFIG, phase="warmup")


def test_choice_ignores_scale_and_lse_is_the_natural_log():
    q, k, v = qkv(1, 9, 9, 2, 1, 4, dtype=torch.float64)
    wide = moba_attention(q, k, v, MoBAConfig(4, 1), scale=2.0, backend="portable")
    first = wide.lse[0, 0]
    torch.testing.assert_close(first, 2.0 * (q[0, 0] @ k[0, 0, 0]))
    assert math.isfinite(wide.lse.sum().item())
    assert torch.equal(
        select(CONFIG, q, k, backend="portable").blocks,
        moba_attention(q, k, v, CONFIG, scale=-1.0, backend="portable").selection.blocks,
    )


def test_refuses_borders_of_something_else():
    q, k, v = qkv(1, 9, 9, 2, 1, 4)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0 and end at the 9 tokens"):
        moba_attention(q, k, v, CONFIG, cu_seqlens_q=borders(4, 4))
    with pytest.raises(ValueError, match="v must be .b, s, g, d_value.: s is 9 in k but 8 in v"):
        moba_attention(q, k, v[:, :8], CONFIG)
