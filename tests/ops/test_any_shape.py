"""Every other backend against the definition on shapes that nobody chose."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmsa import Selection, msa_attention, sparse_attention
from tests.support import borders, index_qk, judged_backend, qkv, seeded, widest

# The backend of a parameter stays as it is over all examples.
ONE_BACKEND = [HealthCheck.function_scoped_fixture]


@st.composite
def problems(draw):
    """Sequences of any lengths, packed or as a batch of equal ones, and any sizes."""
    groups, r = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    packed = draw(st.booleans())
    keys = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    queries = [draw(st.integers(0, n)) for n in keys]
    if not packed:
        keys, queries = keys[:1], queries[:1]
    where = {}
    if packed:
        where = {"cu_seqlens_q": borders(*queries), "cu_seqlens_k": borders(*keys)}
    sizes = {
        "b": 1 if packed else draw(st.integers(1, 3)),
        "t": sum(queries),
        "s": sum(keys),
        "h": groups * r,
        "g": groups,
        "d": draw(st.sampled_from([1, 3, 8])),
        "dv": draw(st.sampled_from([1, 4, 8])),
    }
    top_k = draw(st.integers(1, 6))
    rule = {
        "block_size": draw(st.integers(1, 12)),
        "top_k": top_k,
        "local_blocks": draw(st.integers(0, min(top_k, 2))),
    }
    return sizes, rule, where, draw(st.sampled_from(["warmup", "sparse"]))


def run(backend, dtype, sizes, rule, where, phase):
    tensors = qkv(**sizes, dtype=dtype, grad=True)
    b, t, s, g = (sizes[name] for name in "btsg")
    tensors += index_qk(b, t, s, g, 4, dtype=dtype, grad=True)
    made = msa_attention(*tensors, **rule, **where, phase=phase, backend=backend)
    dout = seeded(*made.out.shape, seed=5, dtype=dtype)
    loss = (made.out * dout).sum() + made.index_loss
    results = [made.out, made.lse, made.index_loss, *torch.autograd.grad(loss, tensors)]
    return results if made.selection is None else [*results, made.selection.blocks]


@judged_backend
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=ONE_BACKEND)
@given(problem=problems())
def test_equals_the_definition(backend, problem):
    dtype = widest(backend)
    for ours, definition in zip(run(backend, dtype, *problem), run("reference", dtype, *problem)):
        torch.testing.assert_close(ours, definition)


@judged_backend
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=ONE_BACKEND)
@given(seed=st.integers(0, 10**6), per=st.sampled_from(["all", "group", "head"]))
def test_any_block_numbers_are_read_alike(backend, seed, per):
    """Selections that no selector would make: unsorted, repeated, negative, beyond the end."""
    q, k, v = qkv(2, 9, 23, 4, 2, 3, seed=seed, dtype=widest(backend), grad=True)
    groups = {"all": 1, "group": 2, "head": 4}[per]
    drawn = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    blocks = torch.randint(-2, 9, (2, groups, 9, 5), **drawn, dtype=torch.int32).to(q.device)
    dout = seeded(2, 9, 4, 3, seed=seed, dtype=q.dtype)
    results = []
    for name in (backend, "reference"):
        out, lse = sparse_attention(q, k, v, Selection(blocks, 4), return_lse=True, backend=name)
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), dout)))
    for ours, definition in zip(*results):
        torch.testing.assert_close(ours, definition)
