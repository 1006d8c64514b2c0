"""NSA as a whole: against its equations, its limits, where gradients go, and its config."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from openmsa import dense_attention
from openmsa.mechanisms.nsa import NSAConfig, compress, nsa_attention
from openmsa.ops import workspace
from openmsa.ops.pooled_selection import mean_pool
from tests.support import (
    assert_as_good_as_eager,
    borders,
    eager_attention,
    every_backend,
    qkv,
    seeded,
)

CONFIG = NSAConfig(kernel=8, stride=4, block_size=12, top_k=4, window=7)
ALL = NSAConfig(kernel=8, stride=4, block_size=12, top_k=9, window=99)
judged = pytest.mark.parametrize("backend", ["reference", "portable"])


def tensors(b, t, s, config=CONFIG, h=4, g=2, d=8, dv=6, dtype=torch.float64, grad=False):
    """q, k, v, both compression weights and gates."""
    return (
        *qkv(b, t, s, h, g, d, dv, dtype=dtype, grad=grad),
        seeded(config.kernel, g, d, seed=20, dtype=dtype, grad=grad),
        seeded(config.kernel, g, dv, seed=21, dtype=dtype, grad=grad),
        seeded(b, t, h, 3, seed=22, dtype=dtype).sigmoid().requires_grad_(grad),
    )


def nsa(q, k, v, weights_k, weights_v, gates, config=CONFIG, **how):
    windows = {"cu_seqlens_k": how.get("cu_seqlens_k")}
    k_compressed = compress(k, weights_k, config, **windows)
    v_compressed = compress(v, weights_v, config, **windows)
    return nsa_attention(q, k, v, k_compressed, v_compressed, gates, config, **how)


def softmaxed(q, keys, values):
    """q [d], keys [n, d], values [n, dv] -> weights [n] and output [dv]; nothing gives 0."""
    weights = (keys @ q / math.sqrt(len(q))).softmax(0)
    return weights, weights @ values


def by_equation(q, k, v, weights_k, weights_v, gates, config=CONFIG):
    """Equations 5 to 12 for one token, group and head after the other; [1, t, h, dv]."""
    (_, t, h, _), (s, g) = q.shape, k.shape[1:3]
    out = []
    for i in range(t):
        p = s - t + i
        n = [j for j in range(s) if j * config.stride + config.kernel - 1 <= p]
        for group in range(g):
            heads = range(group * h // g, (group + 1) * h // g)
            keys, values = k[0, :, group], v[0, :, group]
            window = [slice(j * config.stride, j * config.stride + config.kernel) for j in n]
            pooled = [(weights_k[:, group].softmax(0) * keys[j]).sum(0) for j in window]
            values_of = [(weights_v[:, group].softmax(0) * values[j]).sum(0) for j in window]
            seen = [
                softmaxed(q[0, i, x], torch.stack(pooled), torch.stack(values_of))
                for x in heads
                if n
            ]
            worth = sum(weights for weights, _ in seen)
            tokens = chosen_tokens(p, worth, window, config)
            for place, x in enumerate(heads):
                compressed = seen[place][1] if n else 0
                selected = softmaxed(q[0, i, x], keys[tokens], values[tokens])[1]
                latest = slice(max(0, p - config.window + 1), p + 1)
                local = softmaxed(q[0, i, x], keys[latest], values[latest])[1]
                gate = gates[0, i, x]
                out.append(gate[0] * compressed + gate[1] * selected + gate[2] * local)
    return torch.stack(out).view(1, t, h, -1)


def chosen_tokens(p, worth, window, config):
    """The visible tokens of the first block, the two latest, and the best others."""
    size = config.block_size
    own = p // size
    forced = {0, own, max(0, own - 1)}
    scores = {}
    for block in set(range(own + 1)) - forced:
        inside = range(block * size, (block + 1) * size)
        overlap = [len(set(inside) & set(range(w.start, w.stop))) for w in window]
        scores[block] = sum(float(a.detach()) * b for a, b in zip(worth, overlap))
    best = sorted(scores, key=lambda block: (-scores[block], block))
    blocks = forced | set(best[: config.top_k - len(forced)])
    return [j for j in range(p + 1) if j // size in blocks]


@judged
@pytest.mark.parametrize(("t", "s"), [(83, 83), (21, 90)])
def test_output_and_gradients_are_those_of_the_equations(backend, t, s):
    inputs = tensors(1, t, s, grad=True)
    truth = by_equation(*inputs)
    made = nsa(*inputs, backend=backend).out
    torch.testing.assert_close(made, truth)
    dout = seeded(*truth.shape, seed=3, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(x, inputs, dout) for x in (made, truth))):
        torch.testing.assert_close(a, b)


def eager(q, k, v, weights_k, weights_v, gates, blocks):
    """What eager torch computes in the dtype of q; every query must see a window."""
    t, s = q.shape[1], k.shape[1]
    place, position = torch.arange(s), torch.arange(s - t, s)[:, None]
    last = torch.arange(0, s - CONFIG.kernel + 1, CONFIG.stride) + CONFIG.kernel - 1
    pooled = (
        (x.unfold(1, CONFIG.kernel, CONFIG.stride).movedim(-1, 2) * weights.softmax(0)).sum(2)
        for x, weights in ((k, weights_k), (v, weights_v))
    )
    chosen = (blocks[..., None] == place // CONFIG.block_size).any(-2) & (place <= position)
    latest = (place <= position) & (place > position - CONFIG.window)
    branches = (
        eager_attention(q, *pooled, (last <= position)[None, None], q.shape[3] ** -0.5),
        eager_attention(q, k, v, chosen, q.shape[3] ** -0.5),
        eager_attention(q, k, v, latest[None, None], q.shape[3] ** -0.5),
    )
    return sum(gates[..., i, None] * branch for i, branch in enumerate(branches))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_as_good_as_eager(backend, dtype):
    inputs = tensors(2, 61, 90, h=32, dtype=dtype, grad=True)
    made = nsa(*inputs, backend=backend)
    dout = seeded(*made.out.shape, seed=3, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs = (
        (made.out, inputs),
        (eager(*inputs, made.selection.blocks), inputs),
        (eager(*exact, made.selection.blocks), exact),
    )
    results = [
        (out, *torch.autograd.grad(out, x, dout.to(out.dtype), retain_graph=True))
        for out, x in outputs
    ]
    for what, *three in zip(("out", "q", "k", "v", "weights_k", "weights_v", "gates"), *results):
        assert_as_good_as_eager(*three, what=what)


def test_weights_begin_as_the_mean():
    k = seeded(2, 50, 2, 8, dtype=torch.float64)
    zeros = torch.zeros(8, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(compress(k, zeros, CONFIG), mean_pool(k, kernel=8, stride=4)[0])


@pytest.mark.parametrize("s", [0, 7, 8, 11, 12, 50])
def test_compress_is_a_weighted_sum_over_each_window(s, monkeypatch):
    x = seeded(2, s, 2, 5, dtype=torch.float64, grad=True)
    weights = seeded(8, 2, 5, seed=1, dtype=torch.float64, grad=True)
    n = max(0, (s - 8) // 4 + 1)
    share = weights.softmax(0)
    truth = [(x[:, 4 * j : 4 * j + 8] * share).sum(1) for j in range(n)]
    truth = torch.stack(truth, 1) if n else x[:, :0]
    monkeypatch.setattr(workspace, "CACHE_BYTES", 1 << 12)
    made = compress(x, weights, CONFIG)
    torch.testing.assert_close(made, truth)
    if n:
        dout = seeded(*made.shape, seed=3, dtype=torch.float64)
        for a, b in zip(*(torch.autograd.grad(y, (x, weights), dout) for y in (made, truth))):
            torch.testing.assert_close(a, b)


@judged
@pytest.mark.parametrize("branch", [1, 2])
@pytest.mark.parametrize("s", [1, 11, 12, 40, 95])
def test_one_branch_that_reads_everything_is_dense(backend, branch, s):
    q, k, v, *weights, gates = tensors(2, s, s, ALL)
    gates = torch.zeros_like(gates)
    gates[..., branch] = 1
    made = nsa(q, k, v, *weights, gates, ALL, backend=backend)
    torch.testing.assert_close(made.out, dense_attention(q, k, v, backend="reference"))


def test_compressed_branch_gives_nothing_before_the_first_window():
    q, k, v, *weights, gates = tensors(1, 30, 30)
    gates = torch.eye(3, dtype=gates.dtype)[0].expand_as(gates)
    out = nsa(q, k, v, *weights, gates).out
    assert (out[:, :7] == 0).all()
    assert (out[:, 7:].abs().amax(-1) > 0).all()


def test_gradients_reach_everything_that_learns():
    inputs = tensors(1, 60, 60, grad=True)
    made = nsa(*inputs)
    assert made.index_loss is None
    for gradient in torch.autograd.grad(made.out.square().sum(), inputs):
        assert gradient.abs().sum() > 0


@judged
def test_future_cannot_be_read(backend):
    q, k, v, *weights, gates = tensors(2, 70, 70)
    k_new, v_new = k.clone(), v.clone()
    k_new[:, 41:], v_new[:, 41:] = math.nan, math.nan
    before, after = (
        nsa(q, *kv, *weights, gates, backend=backend).out[:, :41] for kv in ((k, v), (k_new, v_new))
    )
    torch.testing.assert_close(before, after)


@judged
def test_decoding_equals_the_full_pass(backend):
    q, k, v, *weights, gates = tensors(2, 70, 70)
    full = nsa(q, k, v, *weights, gates, backend=backend)
    for start, end in ((0, 1), (6, 7), (7, 8), (10, 12), (13, 47), (69, 70)):
        here = slice(start, end)
        step = nsa(q[:, here], k[:, :end], v[:, :end], *weights, gates[:, here], backend=backend)
        torch.testing.assert_close(step.out, full.out[:, here])


@judged
@pytest.mark.parametrize(
    ("tq", "sk"),
    [((7, 0, 40, 1, 23), (7, 9, 40, 33, 70)), ((1, 1, 1), (50, 3, 8)), ((5, 3), (5, 7))],
)
def test_packed_equals_alone_with_gradients(backend, tq, sk):
    inputs = tensors(1, sum(tq), sum(sk), grad=True)
    q, k, v, *weights, gates = inputs
    where = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    packed = nsa(*inputs, **where, backend=backend).out
    parts = zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1), gates.split(tq, 1))
    apart = [nsa(*x[:3], *weights, x[3], backend=backend).out for x in parts]
    apart = torch.cat(apart, 1)
    torch.testing.assert_close(packed, apart)
    dout = seeded(*packed.shape, seed=9, dtype=packed.dtype)
    kept = (q, k, v, gates)
    for a, b in zip(*(torch.autograd.grad(x, kept, dout) for x in (packed, apart))):
        torch.testing.assert_close(a, b)


def test_keys_of_the_window_may_be_others():
    q, k, v, *weights, gates = tensors(1, 30, 30)
    gates = torch.eye(3, dtype=gates.dtype)[2].expand_as(gates)
    other = qkv(1, 30, 30, 4, 2, 8, 6, seed=40, dtype=torch.float64)[1:]
    made = nsa(q, k, v, *weights, gates, kv_window=other)
    torch.testing.assert_close(made.out, nsa(q, *other, *weights, gates).out)


def test_dense_phase_reads_neither_gate_nor_window():
    q, k, v, _, _, gates = tensors(1, 30, 30)
    made = nsa_attention(q, k, v, None, None, gates, CONFIG, phase="dense")
    out, lse = dense_attention(q, k, v, return_lse=True)
    assert torch.equal(made.out, out) and torch.equal(made.lse, lse)
    assert made.selection is None


def test_autocast_computes_in_its_dtype():
    inputs = tensors(1, 40, 40, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        made = nsa(*inputs).out
        gradients = torch.autograd.grad(made.float().sum(), inputs)
    assert made.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in gradients)


def test_config_is_the_papers_by_default_and_frozen():
    config = NSAConfig()
    assert dataclasses.astuple(config) == (32, 16, 64, 16, 512, 2, 1, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 8
    assert NSAConfig(layers=[3, 1]).layers == (1, 3)
    assert NSAConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": 0}, "kernel must be a whole number of at least 1, got 0"),
        ({"kernel": 24}, "kernel=24 must be a multiple of stride=16"),
        ({"block_size": 40}, "block_size=40 must be a multiple of stride=16"),
        ({"top_k": 2}, "top_k=2 cannot hold 3 blocks"),
        ({"layers": 3}, "layers must be a list"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        NSAConfig(**fields)


def test_refuses_what_does_not_fit():
    q, k, v, weights_k, weights_v, gates = tensors(1, 30, 30)
    with pytest.raises(ValueError, match="phase must be one of dense, sparse, got 'warmup'"):
        nsa(q, k, v, weights_k, weights_v, gates, phase="warmup")
    with pytest.raises(ValueError, match="gates must have shape"):
        nsa(q, k, v, weights_k, weights_v, gates[..., :2])
    with pytest.raises(ValueError, match="weights must be"):
        compress(k, weights_k[:5], CONFIG)
    with pytest.raises(ValueError, match="k_compressed=None will do in the phase 'dense' only"):
        nsa_attention(q, k, v, None, None, gates, CONFIG)
    with pytest.raises(ValueError, match="k_pooled has 5 windows"):
        few = compress(k, weights_k, CONFIG)[:, :5], compress(v, weights_v, CONFIG)[:, :5]
        nsa_attention(q, k, v, *few, gates, CONFIG)
