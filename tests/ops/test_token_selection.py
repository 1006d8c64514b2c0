"""select_tokens: DeepSeek's lightning indexer, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa import Selection
from openmsa.ops import workspace
from openmsa.ops.backend import availability
from openmsa.ops.token_selection import portable, select_tokens
from tests.ops.test_memory import largest_allocation
from tests.support import borders, seeded

both_codes = pytest.mark.parametrize("backend", ["reference", "portable"])


def index(b, t, s, heads, d, *, seed=0, dtype=torch.float64):
    """q_index [b, t, heads, d], k_index [b, s, d], head_weights [b, t, heads]"""
    return (
        seeded(b, t, heads, d, seed=seed, dtype=dtype),
        seeded(b, s, d, seed=seed + 1, dtype=dtype),
        seeded(b, t, heads, seed=seed + 2, dtype=dtype),
    )


def whole_numbers(b, t, s, heads, d, *, dtype=torch.float32):
    """Small integers: exact in every dtype, with many equal scores and many zeros."""
    return tuple(x.round().clamp(-2, 2) for x in index(b, t, s, heads, d, dtype=dtype))


def by_hand(q_index, k_index, head_weights, top_k):
    """The choice, token by token: int32 [b, 1, t, top_k]."""
    (b, t), s = q_index.shape[:2], k_index.shape[1]
    chosen = torch.full((b, 1, t, top_k), -1, dtype=torch.int32)
    for batch in range(b):
        for i in range(t):
            worth = []
            for key in range(s - t + i + 1):
                heads = q_index[batch, i].double() @ k_index[batch, key].double()
                score = float((head_weights[batch, i].double() * heads.clamp(min=0)).sum())
                worth.append((math.inf if math.isnan(score) else -score, key))
            kept = sorted(key for _, key in sorted(worth)[:top_k])
            chosen[batch, 0, i, : len(kept)] = torch.tensor(kept)
    return chosen


@both_codes
@pytest.mark.parametrize("piece", [7, 1 << 13], ids=["pieces", "whole"])
@pytest.mark.parametrize(
    ("b", "t", "s", "heads", "d", "top_k"),
    [
        (2, 37, 37, 3, 5, 4),
        (1, 9, 41, 1, 8, 7),  # the last queries of more keys
        (2, 1, 53, 4, 16, 11),  # decoding
        (1, 19, 19, 2, 4, 64),  # more than there are
    ],
)
def test_the_best_tokens_are_kept(backend, piece, monkeypatch, b, t, s, heads, d, top_k):
    monkeypatch.setattr(portable, "KEYS_AT_ONCE", piece)
    inputs = index(b, t, s, heads, d)
    made = select_tokens(*inputs, top_k=top_k, backend=backend)
    assert (made.block_size, made.blocks.dtype) == (1, torch.int32)
    assert torch.equal(made.blocks, by_hand(*inputs, top_k))


@both_codes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_scores_go_to_the_lower_token(backend, dtype, monkeypatch):
    """Most scores are 0 here: of a relu that is the usual tie, and -0 must equal +0."""
    monkeypatch.setattr(portable, "KEYS_AT_ONCE", 8)
    inputs = whole_numbers(2, 30, 33, 2, 3, dtype=dtype)
    made = select_tokens(*inputs, top_k=6, backend=backend)
    assert torch.equal(made.blocks, by_hand(*inputs, 6))
    nothing = [torch.zeros_like(x) for x in inputs]
    first = select_tokens(*nothing, top_k=6, backend=backend)
    assert first.blocks[0, 0, -1].tolist() == [0, 1, 2, 3, 4, 5]


@both_codes
def test_nan_scores_lowest_and_the_future_is_unseen(backend, monkeypatch):
    monkeypatch.setattr(portable, "KEYS_AT_ONCE", 5)
    q_index, k_index, head_weights = index(1, 20, 20, 2, 4)
    k_index[:, 3] = math.nan
    made = select_tokens(q_index, k_index, head_weights, top_k=4, backend=backend)
    assert torch.equal(made.blocks, by_hand(q_index, k_index, head_weights, 4))
    assert 3 in made.blocks[0, 0, 3] and 3 not in made.blocks[0, 0, 4:]
    changed = k_index.clone()
    changed[:, 12:] = math.nan
    again = select_tokens(q_index, changed, head_weights, top_k=4, backend=backend)
    assert torch.equal(again.blocks[:, :, :12], made.blocks[:, :, :12])


@both_codes
def test_packed_sequences_are_each_alone(backend):
    tq, sk = (7, 0, 20, 1, 3), (9, 4, 20, 12, 3)
    q_index, k_index, head_weights = index(1, sum(tq), sum(sk), 3, 5)
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    inputs = q_index, k_index, head_weights
    made = select_tokens(*inputs, top_k=5, backend=backend, **packed)
    parts = zip(q_index.split(tq, 1), k_index.split(sk, 1), head_weights.split(tq, 1))
    alone = [select_tokens(*part, top_k=5, backend=backend).blocks for part in parts]
    assert torch.equal(made.blocks, torch.cat(alone, 2))


@both_codes
def test_decoding_equals_the_full_pass(backend):
    q_index, k_index, head_weights = index(2, 40, 40, 3, 5)
    full = select_tokens(q_index, k_index, head_weights, top_k=6, backend=backend).blocks
    for start, end in ((0, 1), (6, 7), (13, 20), (39, 40)):
        here = slice(start, end)
        step = q_index[:, here], k_index[:, :end], head_weights[:, here]
        made = select_tokens(*step, top_k=6, backend=backend)
        assert torch.equal(made.blocks, full[:, :, here])


def test_a_positive_scale_and_the_dtype_of_the_weights_change_no_choice():
    inputs = whole_numbers(1, 20, 20, 2, 3, dtype=torch.bfloat16)
    expected = select_tokens(*inputs, top_k=4).blocks
    q_index, k_index, head_weights = inputs
    made = select_tokens(q_index, k_index, head_weights.float(), top_k=4, index_scale=0.125)
    assert torch.equal(made.blocks, expected)
    worst_first = select_tokens(*inputs, top_k=4, index_scale=-1.0)
    negated = select_tokens(q_index, k_index, -head_weights, top_k=4)
    assert torch.equal(worst_first.blocks, negated.blocks)


def test_every_backend_that_is_usable_here_is_served():
    inputs = whole_numbers(1, 20, 20, 2, 3)
    for name in (name for name, reason in availability().items() if reason is None):
        made = select_tokens(*inputs, top_k=4, backend=name)
        assert torch.equal(made.blocks, by_hand(*inputs, 4)), name


def test_no_matrix_of_queries_and_keys_exists(monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1 << 20)
    monkeypatch.setattr(workspace, "CACHE_BYTES", 1 << 20)
    monkeypatch.setattr(portable, "KEYS_AT_ONCE", 256)
    inputs = index(1, 2048, 2048, 4, 4, dtype=torch.float32)
    largest = largest_allocation(lambda: select_tokens(*inputs, top_k=8, backend="portable"))
    assert largest < 2048 * 2048 / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k must be a whole number"),
        ({"index_scale": math.nan}, "index_scale must be a finite number"),
        ({"head_weights": torch.zeros(1, 8, 3)}, "head_weights must have shape (1, 8, 2)"),
        ({"head_weights": torch.zeros(1, 8, 2, dtype=torch.int32)}, "must be floating point"),
        ({"k_index": torch.zeros(1, 8, 5)}, "d_index is 4 in q_index but 5"),
        ({"k_index": torch.zeros(1, 7, 4)}, "8 query tokens cannot be the last of 7"),
        ({"q_index": torch.zeros(1, 8, 0, 4)}, "at least 1 index head"),
        ({"backend": "fastest"}, "backend='fastest' is unknown"),
    ],
)
def test_refusals(change, message):
    given = {
        "q_index": torch.zeros(1, 8, 2, 4),
        "k_index": torch.zeros(1, 8, 4),
        "head_weights": torch.zeros(1, 8, 2),
    }
    with pytest.raises(ValueError) as refusal:
        select_tokens(**(given | change))
    assert message in str(refusal.value)


def test_the_choice_carries_no_gradient_and_compiles():
    q_index, k_index, head_weights = (x.requires_grad_() for x in index(1, 12, 12, 2, 4))

    def run(*inputs):
        return select_tokens(*inputs, top_k=3, backend="portable").blocks

    made = run(q_index, k_index, head_weights)
    assert not made.requires_grad
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q_index, k_index, head_weights), made)
    assert isinstance(Selection(made, 1), Selection)
