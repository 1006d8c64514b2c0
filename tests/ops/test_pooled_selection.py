"""pooled_selection: the definition to the letter."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa.ops import workspace
from openmsa.ops.pooled_selection import (
    mean_pool,
    num_windows,
    pooled_selection,
)
from tests.ops.test_memory import largest_allocation
from tests.support import borders, seeded

# The other names run the portable code.
both = pytest.mark.parametrize("backend", ["reference", "portable"])
FORMS = {
    "moba": {"score": "dot", "per_head": True},
    "nsa": {"score": "softmax", "pool": "sum"},
    "infllm2": {"score": "softmax", "pool": "max"},
    "dot of a group": {"score": "dot"},
    "softmax of a head": {"score": "softmax", "pool": "sum", "per_head": True},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
RULE = {"kernel": 4, "stride": 2, "block_size": 4, "top_k": 4}


def problem(b, t, s, h=4, g=2, d=8, *, kernel=4, stride=2, dtype=torch.float64):
    """q [b, t, h, d] and the keys of all windows"""
    k = seeded(b, s, g, d, seed=1, dtype=dtype)
    return seeded(b, t, h, d, dtype=dtype), mean_pool(k, kernel=kernel, stride=stride)[0]


def worth(p, block, kernel, stride, block_size, score, pool):
    """What a block is worth, from the scores of the visible windows, one after the other."""
    found = []
    for window, x in p.items():
        inside = {*range(window * stride, window * stride + kernel)} & {
            *range(block * block_size, (block + 1) * block_size)
        }
        if inside:
            found.append(x * len(inside) / kernel if pool == "sum" else x)
    least = 0 if score == "softmax" else -math.inf
    return sum(found) if pool == "sum" else max(found, default=least)


def by_hand(
    q, k_pooled, *, num_keys, kernel, stride, block_size, top_k, local_blocks=1, sink_blocks=0,
    score="softmax", pool="max", per_head=False,
):  # fmt: skip
    """The definition once more, one query and window at a time. Windows with NaN are not there."""
    (b, t, h, d), g = q.shape, k_pooled.shape[2]
    r = h // g
    rows = torch.full((b, h if per_head else g, t, top_k), -1, dtype=torch.int32)
    for i, x, row in torch.cartesian_prod(*map(torch.arange, (b, t, rows.shape[1]))).tolist():
        position = num_keys - t + x
        own = position // block_size
        seen = range(num_windows(position + 1, kernel, stride))
        seen = [w for w in seen if not k_pooled[i, w].isnan().any()]
        heads = [row] if per_head else range(row * r, row * r + r)
        total = torch.zeros(len(seen), dtype=torch.float64)
        for head in heads:
            scores = k_pooled[i, seen, head // r].double() @ q[i, x, head].double() / d**0.5
            total += scores.softmax(0) if score == "softmax" else scores
        sizes = kernel, stride, block_size, score, pool
        p = dict(zip(seen, total.tolist()))
        value = {n: worth(p, n, *sizes) for n in range(own + 1)}
        forced = [n for n in value if n > own - local_blocks or n < sink_blocks]
        others = sorted(set(value) - set(forced), key=lambda n: (-value[n], n))
        kept = sorted((forced + others)[:top_k])
        rows[i, row, x, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return rows


@both
@every_form
@pytest.mark.parametrize(
    ("t", "s", "kernel", "stride", "block_size", "top_k", "local_blocks", "sink_blocks"),
    [
        (37, 37, 4, 2, 4, 3, 1, 0),  # windows overlap blocks and each other; short tail
        (13, 50, 8, 2, 4, 4, 2, 1),  # windows longer than blocks, unaligned offset
        (1, 61, 4, 4, 4, 5, 1, 0),  # a window a block; decoding
        (40, 40, 3, 3, 6, 2, 0, 0),  # odd sizes, nothing forced
        (30, 30, 5, 2, 4, 3, 1, 1),  # a window that ends between two beginnings
        (20, 20, 16, 8, 8, 16, 1, 0),  # fewer blocks than slots
        (5, 5, 8, 4, 4, 2, 1, 0),  # no window at all
    ],
)
def test_is_the_definition(
    backend, form, t, s, kernel, stride, block_size, top_k, local_blocks, sink_blocks
):
    q, k_pooled = problem(2, t, s, kernel=kernel, stride=stride)
    rule = {"kernel": kernel, "stride": stride, "block_size": block_size, "top_k": top_k}
    rule |= {"local_blocks": local_blocks, "sink_blocks": sink_blocks, "num_keys": s}
    chosen = pooled_selection(q, k_pooled, **rule, **form, backend=backend)
    assert chosen.block_size == block_size
    assert chosen.blocks.dtype == torch.int32
    assert torch.equal(chosen.blocks, by_hand(q, k_pooled, **rule, **form))


@both
def test_a_window_counts_for_every_block_it_overlaps_and_ties_go_to_the_lower(backend):
    """One window, tokens 6 to 9 of blocks of 4, is all that matters: it lies in blocks 1 and 2."""
    k_pooled = torch.zeros(1, num_windows(40, 4, 2), 1, 1)
    k_pooled[0, 3] = 9.0
    rule = {**RULE, "num_keys": 40, "local_blocks": 0, "backend": backend}
    for top_k, kept in ((1, [1]), (2, [1, 2]), (3, [0, 1, 2])):
        rule["top_k"] = top_k
        chosen = pooled_selection(torch.ones(1, 40, 1, 1), k_pooled, **rule).blocks
        assert chosen[0, 0, -1].tolist() == kept


@both
@every_form
def test_future_keys_change_nothing(backend, form):
    q, k_pooled = problem(1, 50, 50)
    changed = k_pooled.clone()
    changed[:, 14:] = math.nan  # window 14 ends with token 31
    first, second = (
        pooled_selection(q, k, num_keys=50, **RULE, **form, backend=backend).blocks[:, :, :31]
        for k in (k_pooled, changed)
    )
    assert torch.equal(first, second)


@both
@every_form
def test_nan_scores_lowest_and_spoils_no_other_window(backend, form):
    q, k_pooled = problem(1, 50, 50, kernel=4, stride=4)
    k_pooled[:, 3] = math.nan
    rule = {**RULE, "stride": 4, "num_keys": 50}
    chosen = pooled_selection(q, k_pooled, **rule, **form, backend=backend).blocks
    assert torch.equal(chosen, by_hand(q, k_pooled, **rule, **form))
    assert not (chosen[:, :, 24:] == 3).any()


@both
@every_form
def test_decoding_equals_the_full_pass(backend, form):
    q, k_pooled = problem(2, 45, 45)
    full = pooled_selection(q, k_pooled, num_keys=45, **RULE, **form, backend=backend).blocks
    for end in (1, 4, 5, 44, 45):
        windows = k_pooled[:, : num_windows(end, 4, 2)]
        step = pooled_selection(
            q[:, end - 1 : end], windows, num_keys=end, **RULE, **form, backend=backend
        )
        assert torch.equal(step.blocks, full[:, :, end - 1 : end])


@both
@every_form
def test_packed_equals_alone(backend, form):
    tq, sk = (7, 0, 20, 1, 2), (9, 4, 33, 12, 2)
    q, k = seeded(1, sum(tq), 4, 8, dtype=torch.float64), seeded(1, sum(sk), 2, 8, seed=1).double()
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    k_pooled, _ = mean_pool(k, kernel=4, stride=2, cu_seqlens_k=packed["cu_seqlens_k"])
    rule = {**RULE, **form, "backend": backend}
    together = pooled_selection(q, k_pooled, num_keys=sum(sk), **rule, **packed).blocks
    alone = [
        pooled_selection(
            one, mean_pool(keys, kernel=4, stride=2)[0], num_keys=keys.shape[1], **rule
        ).blocks
        for one, keys in zip(q.split(tq, 1), k.split(sk, 1))
    ]
    assert torch.equal(together, torch.cat(alone, 2))


@both
@pytest.mark.parametrize("s", [0, 5])
def test_no_queries(backend, s):
    q, k_pooled = problem(2, 0, s)
    chosen = pooled_selection(q, k_pooled, num_keys=s, **RULE, backend=backend)
    assert chosen.blocks.shape == (2, 2, 0, 4)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_fp32(form, dtype):
    """Both backends multiply in fp32, so they differ only where two blocks are a last place apart:
    then the worth of what they keep is the same."""
    q, k_pooled = problem(1, 300, 300, dtype=dtype)
    rule = {**RULE, "num_keys": 300, **form}
    chosen = pooled_selection(q, k_pooled, **rule, backend="portable").blocks
    truth = pooled_selection(q.double(), k_pooled.double(), **rule, backend="reference").blocks
    assert (chosen == truth).all(-1).double().mean() > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        again = pooled_selection(q, k_pooled, **rule, backend="portable").blocks
    assert torch.equal(again, chosen)


@every_form
@pytest.mark.parametrize("groups", [1, 3])
def test_cut_into_pieces_is_the_same(form, groups, monkeypatch):
    q, k_pooled = problem(2, 150, 200, h=6, g=groups)
    rule = {**RULE, "num_keys": 200, **form, "backend": "portable"}
    whole = pooled_selection(q, k_pooled, **rule).blocks
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 20_000)
    assert torch.equal(pooled_selection(q, k_pooled, **rule).blocks, whole)


@pytest.mark.parametrize("form", ["moba", "nsa", "infllm2"])
def test_no_matrix_of_the_problem_is_allocated(form, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1 << 20)
    monkeypatch.setattr(workspace, "CACHE_BYTES", 1 << 20)
    tokens = 2048
    q, k_pooled = problem(1, tokens, tokens, d=4, dtype=torch.float32)
    rule = {**RULE, "num_keys": tokens, **FORMS[form], "backend": "portable"}
    one_head = 4 * tokens * k_pooled.shape[1]  # bytes of fp32 scores of one head
    assert largest_allocation(lambda: pooled_selection(q, k_pooled, **rule)) < one_head / 4


def test_device_names_run_here_what_their_devices_run():
    q, k_pooled = problem(1, 30, 30, dtype=torch.float32)
    rule = {**RULE, "num_keys": 30}
    default = pooled_selection(q, k_pooled, **rule).blocks
    assert torch.equal(pooled_selection(q, k_pooled, **rule, backend="portable").blocks, default)
    with pytest.raises(ValueError, match="backend='cudnn' is unknown"):
        pooled_selection(q, k_pooled, **rule, backend="cudnn")
    on_meta = pooled_selection(q.to("meta"), k_pooled.to("meta"), **rule, per_head=True)
    assert on_meta.blocks.shape == (1, 4, 30, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 8, 3, 8)}, "3 heads of q must be a multiple of the 2 KV heads"),
        ({"k_pooled": torch.zeros(1, 3, 2, 7)}, "d is 8 in q but 7 in k_pooled"),
        ({"k_pooled": torch.zeros(1, 4, 2, 8)}, "4 windows, but 8 keys have 3 of kernel=4"),
        ({"num_keys": 7}, "8 query tokens cannot be the last of 7"),
        ({"num_keys": 8.0}, "num_keys must be a whole number"),
        ({"stride": 8}, "stride=8 must be at most kernel=4"),
        ({"block_size": 5}, "block_size=5 must be a multiple of stride=2"),
        ({"kernel": 0}, "kernel must be a whole number of at least 1"),
        ({"local_blocks": 3, "sink_blocks": 2}, "top_k=4 cannot hold 5 blocks"),
        ({"score": "cosine"}, "score must be 'softmax' or 'dot', got 'cosine'"),
        ({"pool": "mean"}, "pool must be 'max' or 'sum', got 'mean'"),
        ({"pool": "sum", "score": "dot"}, "pool='sum' adds up softmax scores"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"cu_seqlens_q": borders(3, 6)}, "cu_seqlens_q must start at 0 and end at the 8 tokens"),
    ],
)
def test_refuses(changes, message):
    good = {"q": torch.zeros(1, 8, 4, 8), "k_pooled": torch.zeros(1, 3, 2, 8), "num_keys": 8}
    arguments = {**good, **RULE, **changes}
    with pytest.raises(ValueError, match=message):
        pooled_selection(arguments.pop("q"), arguments.pop("k_pooled"), **arguments)


def test_refuses_windows_that_are_missing_in_packed_sequences():
    q, k_pooled = torch.zeros(1, 8, 4, 8), torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="1 windows, but 8 keys have 2"):
        pooled_selection(q, k_pooled, num_keys=8, **RULE, cu_seqlens_q=borders(4, 4))
