"""InfLLM-V2: blocks scored by overlapping means of keys, and the switch to dense attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from openmsa import dense_attention
from openmsa.mechanisms.infllm2 import InfLLM2Config, infllm2_attention, select
from openmsa.ops.pooled_selection import mean_pool
from tests.support import (
    assert_as_good_as_eager,
    borders,
    eager_attention,
    every_backend,
    judged_backend,
    qkv,
    readable,
    widest,
)

RULE = {"kernel": 4, "stride": 2, "block_size": 8, "top_k": 4, "local_blocks": 2, "sink_blocks": 1}
CONFIG = InfLLM2Config(**RULE, dense_below=0)


def from_the_equations(q, k, v, kernel, stride, block_size, top_k, local_blocks, sink_blocks):
    """The paper's equations, one query and group at a time, in fp64; gradients by autograd.

    Written as the official code goes: softmax over kernels, sum over the group, and a maximum over
    the kernels that begin up to one kernel before the block and before its end.
    """
    (b, t, h, d), (s, g) = q.shape, k.shape[1:3]
    r, rows = h // g, []
    for i, x, group in torch.cartesian_prod(*map(torch.arange, (b, t, g))).tolist():
        position = s - t + x
        keys = k[i, : position + 1, group]
        heads = q[i, x, group * r : (group + 1) * r]
        relevance = torch.zeros(0, dtype=q.dtype)
        if position + 1 >= kernel:
            means = keys.unfold(0, kernel, stride).mean(-1)
            relevance = (heads @ means.T / d**0.5).softmax(-1).sum(0).detach()
        own = position // block_size
        ranks = []
        for n in range(own + 1):
            begins = torch.arange(len(relevance)) * stride
            touches = (begins + kernel > n * block_size) & (begins < (n + 1) * block_size)
            value = max(relevance[touches].tolist(), default=0.0)
            forced = n < sink_blocks or own - local_blocks < n
            ranks.append((not forced, -value, n))
        chosen = {n for _, _, n in sorted(ranks)[:top_k]}
        read = [j for j in range(position + 1) if j // block_size in chosen]
        weights = (heads @ k[i, read, group].T / d**0.5).softmax(-1)
        rows.append(weights @ v[i, read, group])
    return torch.stack(rows).view(b, t, h, -1)


def close_with_gradients(inputs, config, rule, backend):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    made = infllm2_attention(*inputs, config, backend=backend)
    truth = from_the_equations(*exact, **rule)
    torch.testing.assert_close(made.out.double(), truth, atol=1e-5, rtol=1e-5)
    slope = torch.linspace(-1, 1, truth.numel(), dtype=torch.float64).view_as(truth)
    made.out.backward(slope.to(made.out.dtype))
    truth.backward(slope)
    for ours, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


@every_backend
@pytest.mark.parametrize(("t", "s"), [(61, 61), (9, 57), (1, 3)])
def test_is_the_paper_with_gradients(backend, t, s):
    inputs = qkv(2, t, s, 4, 2, 8, dtype=widest(backend), grad=True)
    close_with_gradients(inputs, CONFIG, RULE, backend)


@every_backend
def test_is_the_paper_with_its_own_numbers(backend):
    """32 tokens every 16, blocks of 64; fewer of them, so that 900 keys are sparse."""
    rule = {"kernel": 32, "stride": 16, "block_size": 64, "top_k": 6}
    rule |= {"local_blocks": 2, "sink_blocks": 1}
    inputs = qkv(1, 7, 907, 4, 1, 16, dtype=widest(backend), grad=True)
    close_with_gradients(inputs, InfLLM2Config(**rule, dense_below=0), rule, backend)


@judged_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_good_as_eager(backend, dtype):
    q, k, v = qkv(1, 200, 200, 4, 2, 16, dtype=dtype, grad=True)
    config = InfLLM2Config(8, 4, 16, top_k=5, local_blocks=2, dense_below=200)
    made = infllm2_attention(q, k, v, config, backend=backend)
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
def test_heads_of_a_group_share_and_forced_blocks_are_kept(backend):
    q, k, _ = qkv(1, 80, 80, 4, 2, 8, dtype=widest(backend))
    blocks = select(CONFIG, q, k, backend=backend).blocks
    assert blocks.shape == (1, 2, 80, 4)
    own = torch.arange(80) // 8
    for forced in (own, (own - 1).clamp(min=0), torch.zeros_like(own)):
        assert (blocks == forced[:, None]).any(-1).all()
    assert not torch.equal(blocks[:, 0], blocks[:, 1])


@every_backend
def test_keeping_every_block_is_dense_and_few_are_not(backend):
    q, k, v = qkv(2, 61, 61, 4, 2, 8, dtype=widest(backend))
    every = infllm2_attention(q, k, v, dataclasses.replace(CONFIG, top_k=8), backend=backend)
    dense = infllm2_attention(q, k, v, CONFIG, phase="dense", backend=backend)
    torch.testing.assert_close(every.out, dense.out)
    torch.testing.assert_close(every.lse, dense.lse)
    few = infllm2_attention(q, k, v, CONFIG, backend=backend).out
    torch.testing.assert_close(few[:, :32], dense.out[:, :32])
    assert (few[:, 40:] - dense.out[:, 40:]).abs().amax((0, 2, 3)).min() > 1e-4


@every_backend
@pytest.mark.parametrize("dense_below", [40, 41])
def test_short_sequences_are_dense(backend, dense_below):
    """The length of the keys decides, so one query of a long sequence is sparse."""
    config = dataclasses.replace(CONFIG, dense_below=dense_below)
    q, k, v = qkv(2, 5, 40, 4, 2, 8, dtype=widest(backend))
    made = infllm2_attention(q, k, v, config, backend=backend)
    assert (made.selection is None) == (dense_below == 41)
    other = CONFIG if dense_below == 40 else dataclasses.replace(CONFIG, top_k=8)
    torch.testing.assert_close(made.out, infllm2_attention(q, k, v, other, backend=backend).out)
    torch.testing.assert_close(
        infllm2_attention(q, k, v, config, phase="dense", backend=backend).out,
        dense_attention(q, k, v),
    )


@every_backend
def test_packed_sequences_switch_one_by_one(backend):
    tq, sk = (12, 50, 0, 1, 9), (30, 50, 3, 64, 29)
    config = dataclasses.replace(CONFIG, dense_below=30)
    inputs = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=widest(backend), grad=True)
    q, k, v = inputs
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    together = infllm2_attention(q, k, v, config, **packed, backend=backend)
    alone = [
        infllm2_attention(*one, config, backend=backend)
        for one in zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1))
    ]
    torch.testing.assert_close(together.out, torch.cat([x.out for x in alone], 1))
    torch.testing.assert_close(together.lse, torch.cat([x.lse for x in alone], 1))
    rows = together.selection.blocks.split(tq, 2)
    for row, one in zip(rows, alone):
        dense = one.selection is None
        assert (row == -1).all() if dense else torch.equal(row, one.selection.blocks)
    assert [x.selection is None for x in alone] == [False, False, True, False, True]
    from_together = torch.autograd.grad(together.out.square().sum(), inputs)
    from_alone = torch.autograd.grad(sum(x.out.square().sum() for x in alone), inputs)
    for ours, theirs in zip(from_together, from_alone):
        torch.testing.assert_close(ours, theirs)


@every_backend
@pytest.mark.parametrize("dense_below", [0, 30])
def test_kernels_already_pooled_choose_alike(backend, dense_below):
    """Packed sequences of which some are dense too: their kernels lie between the others'."""
    tq, sk = (12, 50, 0, 1, 9), (30, 50, 3, 64, 29)
    config = dataclasses.replace(CONFIG, dense_below=dense_below)
    q, k, v = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=widest(backend))
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    for where in (packed, {}):
        k_pooled, _ = mean_pool(k, kernel=4, stride=2, cu_seqlens_k=where.get("cu_seqlens_k"))
        how = {**where, "backend": backend}
        made = infllm2_attention(q, k, v, config, **how)
        given = infllm2_attention(q, k, v, config, k_pooled=k_pooled, **how)
        assert torch.equal(given.selection.blocks, made.selection.blocks)
        assert torch.equal(given.out, made.out)
    other = infllm2_attention(q, k, v, config, k_pooled=k_pooled.flip(1), backend=backend)
    assert not torch.equal(other.selection.blocks, made.selection.blocks)
    with pytest.raises(ValueError, match="k_pooled has 86 windows, but 176 keys have 87"):
        infllm2_attention(q, k, v, config, k_pooled=k_pooled[:, 1:], backend=backend)


@every_backend
def test_decoding_is_the_full_pass_beyond_the_switch(backend):
    q, k, v = qkv(1, 60, 60, 4, 2, 8, dtype=widest(backend))
    config = dataclasses.replace(CONFIG, dense_below=41)
    full = infllm2_attention(q, k, v, config, backend=backend).out
    for end in (41, 42, 60):
        step = infllm2_attention(
            q[:, end - 1 : end], k[:, :end], v[:, :end], config, backend=backend
        ).out
        torch.testing.assert_close(step, full[:, end - 1 : end])


def test_config_is_minicpm4s_by_default_and_frozen():
    config = InfLLM2Config(layers=[2, 0])
    assert (config.kernel, config.stride, config.block_size) == (32, 16, 64)
    assert (config.top_k, config.local_blocks, config.sink_blocks) == (96, 32, 1)
    assert (config.dense_below, config.layers) == (8192, (0, 2))
    assert InfLLM2Config(**dataclasses.asdict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": 0}, "kernel must be a whole number of at least 1, got 0"),
        ({"stride": 64}, "stride=64 must be at most kernel=32"),
        ({"stride": 12}, "block_size=64 must be a multiple of stride=12"),
        ({"top_k": 32}, "top_k=32 cannot hold 33 blocks"),
        ({"local_blocks": -1}, "local_blocks must be a whole number of at least 0"),
        ({"dense_below": -1}, "dense_below must be a whole number of at least 0, got -1"),
        ({"layers": (0, -1)}, "layers must be a whole number"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        InfLLM2Config(**fields)


def test_there_is_no_warmup():
    with pytest.raises(ValueError, match="phase must be one of dense, sparse, got 'warmup'"):
        infllm2_attention(*qkv(1, 4, 4, 2, 1, 4), CONFIG, phase="warmup")


def test_refuses_borders_of_something_else():
    q, k, v = qkv(1, 9, 9, 2, 1, 4)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0 and end at the 9 tokens"):
        infllm2_attention(q, k, v, CONFIG, cu_seqlens_q=borders(4, 4))
    with pytest.raises(ValueError, match="v must be .b, s, g, d_value.: s is 9 in k but 8 in v"):
        infllm2_attention(q, k, v[:, :8], CONFIG)
