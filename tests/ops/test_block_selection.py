"""select_blocks: the definition to the letter, for every backend."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa import select_blocks
from tests.support import borders, every_backend, index_qk, widest


def by_hand(q_index, k_index, block_size, top_k, local_blocks=1, sink_blocks=0):
    """The definition once more, one query at a time with Python's own sort."""
    b, t, g, d = q_index.shape
    s = k_index.shape[1]
    rows = torch.full((b, g, t, top_k), -1, dtype=torch.int32)
    for i in range(b):
        scores = torch.einsum("tgd,sd->gts", q_index[i].double(), k_index[i].double()) / d**0.5
        for j in range(g):
            for x in range(t):
                position = s - t + x
                own = position // block_size
                score = {}
                for n in range(own + 1):
                    seen = scores[j, x, n * block_size : min(position + 1, (n + 1) * block_size)]
                    seen = [v for v in seen.tolist() if not math.isnan(v)]
                    score[n] = max(seen, default=-math.inf)
                forced = [n for n in score if n > own - local_blocks or n < sink_blocks]
                others = sorted(set(score) - set(forced), key=lambda n: (-score[n], n))
                kept = sorted((forced + others)[:top_k])
                rows[i, j, x, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return rows


@every_backend
@pytest.mark.parametrize(
    ("t", "s", "block_size", "top_k", "local_blocks", "sink_blocks"),
    [
        (37, 37, 4, 3, 1, 0),  # short tail
        (17, 40, 8, 2, 1, 0),  # unaligned offset
        (1, 61, 4, 5, 1, 0),  # decoding
        (40, 40, 4, 4, 2, 1),  # sinks and a wider window
        (40, 40, 3, 3, 0, 0),  # nothing forced
        (20, 20, 8, 16, 1, 0),  # fewer blocks than slots
        (9, 9, 1, 3, 1, 0),  # tokens as blocks
    ],
)
def test_is_the_definition(backend, t, s, block_size, top_k, local_blocks, sink_blocks):
    q_index, k_index = index_qk(2, t, s, 3, 8)
    rule = (block_size, top_k, local_blocks, sink_blocks)
    names = ("block_size", "top_k", "local_blocks", "sink_blocks")
    chosen = select_blocks(q_index, k_index, **dict(zip(names, rule)), backend=backend)
    assert chosen.blocks.dtype == torch.int32
    assert torch.equal(chosen.blocks, by_hand(q_index, k_index, *rule))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, "widest", torch.bfloat16, torch.float16])
def test_equal_scores_go_to_the_lower_block(backend, dtype):
    dtype = widest(backend) if dtype == "widest" else dtype
    q_index, k_index = (x.round().to(dtype) for x in index_qk(1, 50, 50, 2, 1))
    chosen = select_blocks(q_index, k_index, block_size=4, top_k=4, backend=backend)
    assert torch.equal(chosen.blocks, by_hand(q_index, k_index, 4, 4))


@every_backend
def test_all_zero_inputs_keep_the_first_blocks_and_the_own(backend):
    q_index, k_index = torch.zeros(1, 40, 1, 4), torch.zeros(1, 40, 4)
    chosen = select_blocks(q_index, k_index, block_size=4, top_k=3, backend=backend)
    assert chosen.blocks[0, 0, -1].tolist() == [0, 1, 9]


@every_backend
def test_minus_zero_equals_plus_zero(backend):
    """A sum of products is never -0, but its product with a negative scale is."""
    k_index = torch.tensor([0.0, -1e-30, 0.0, 1e-30, 0.0]).view(1, 5, 1)
    q_index = torch.full((1, 5, 1, 1), 1e-30)
    for scale in (1.0, -1.0):
        rule = {"block_size": 1, "top_k": 3, "index_scale": scale, "backend": backend}
        chosen = select_blocks(q_index, k_index, **rule)
        assert chosen.blocks[0, 0, -1].tolist() == [0, 1, 4]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, "widest", torch.bfloat16])
def test_nan_scores_lowest_and_spoils_no_other_key(backend, dtype):
    dtype = widest(backend) if dtype == "widest" else dtype
    q_index, k_index = index_qk(1, 60, 60, 2, 4, dtype=dtype)
    k_index[:, 3::7] = math.nan  # some keys of most blocks
    k_index[:, 8:12] = math.nan  # a whole block
    q_index[:, 50] = math.nan  # a query for which every block is equal
    chosen = select_blocks(q_index, k_index, block_size=4, top_k=5, backend=backend).blocks
    assert torch.equal(chosen, by_hand(q_index, k_index, 4, 5))
    assert not (chosen[0, :, 20:50] == 2).any()


@every_backend
def test_infinite_score_does_not_outrank_a_forced_block(backend):
    k_index = torch.zeros(1, 12, 1)
    k_index[0, :8] = math.inf
    q_index = torch.ones(1, 12, 1, 1)
    chosen = select_blocks(q_index, k_index, block_size=2, top_k=2, backend=backend)
    assert chosen.blocks[0, 0, -1].tolist() == [0, 5]


@every_backend
def test_future_keys_change_nothing(backend):
    q_index, k_index = index_qk(1, 50, 50, 2, 4)
    changed = k_index.clone()
    changed[:, 30:40] = 1e4
    changed[:, 40:] = math.nan
    first, second = (
        select_blocks(q_index, k, block_size=4, top_k=3, backend=backend).blocks[:, :, :30]
        for k in (k_index, changed)
    )
    assert torch.equal(first, second)


@every_backend
def test_groups_choose_for_themselves(backend):
    q_index, k_index = index_qk(1, 64, 64, 4, 4)
    chosen = select_blocks(q_index, k_index, block_size=4, top_k=3, backend=backend).blocks
    for group in range(4):
        one = q_index[:, :, [group]]
        alone = select_blocks(one, k_index, block_size=4, top_k=3, backend=backend).blocks
        assert torch.equal(chosen[:, [group]], alone)
    assert not torch.equal(chosen[:, 0], chosen[:, 1])


@every_backend
def test_decoding_equals_the_full_pass(backend):
    q_index, k_index = index_qk(2, 45, 45, 2, 4)
    rule = {"block_size": 4, "top_k": 3, "backend": backend}
    full = select_blocks(q_index, k_index, **rule).blocks
    for end in (1, 4, 5, 44, 45):
        step = select_blocks(q_index[:, end - 1 : end], k_index[:, :end], **rule).blocks
        assert torch.equal(step, full[:, :, end - 1 : end])


@every_backend
def test_packed_equals_alone(backend):
    tq, sk = (7, 0, 20, 1, 3), (9, 4, 20, 12, 3)
    q_index, k_index = index_qk(1, sum(tq), sum(sk), 2, 4)
    rule = {"block_size": 4, "top_k": 3, "backend": backend}
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    together = select_blocks(q_index, k_index, **rule, **packed).blocks
    alone = [
        select_blocks(q, k, **rule).blocks
        for q, k in zip(q_index.split(tq, 1), k_index.split(sk, 1))
    ]
    assert torch.equal(together, torch.cat(alone, 2))


@every_backend
@pytest.mark.parametrize(("t", "s"), [(0, 0), (0, 5)])
def test_no_queries(backend, t, s):
    q_index, k_index = index_qk(2, t, s, 3, 4)
    chosen = select_blocks(q_index, k_index, top_k=2, backend=backend)
    assert chosen.blocks.shape == (2, 3, 0, 2)


@every_backend
def test_scale_may_be_negative_and_changes_the_order(backend):
    q_index, k_index = index_qk(1, 40, 40, 2, 4)
    rule = {"block_size": 1, "top_k": 4, "backend": backend}
    down = select_blocks(q_index, k_index, index_scale=-1.0, **rule).blocks
    assert torch.equal(down, select_blocks(-q_index, k_index, **rule).blocks)


@every_backend
def test_scores_stay_fp32_under_autocast(backend):
    q_index, k_index = index_qk(1, 80, 80, 2, 16)
    q_index, k_index = q_index * 1e-3 + 1, k_index * 1e-3 + 1  # bf16 cannot tell these apart
    rule = {"block_size": 4, "top_k": 3, "backend": backend}
    plain = select_blocks(q_index, k_index, **rule).blocks
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, select_blocks(q_index, k_index, **rule).blocks)
