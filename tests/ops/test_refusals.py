"""Every door says what is wrong, in the caller's words, before any work."""

from __future__ import annotations

import pytest
import torch

from openmsa import (
    Selection,
    dense_attention,
    index_loss,
    msa_attention,
    select_blocks,
    sparse_attention,
)
from openmsa.ops import backend as backends


def good(t=8, s=8):
    """Arguments that fit together, for all doors."""
    return {
        "q": torch.zeros(2, t, 4, 8),
        "k": torch.zeros(2, s, 2, 8),
        "v": torch.zeros(2, s, 2, 8),
        "q_index": torch.zeros(2, t, 2, 8),
        "k_index": torch.zeros(2, s, 8),
        "selection": Selection(torch.zeros(2, 2, t, 3, dtype=torch.int32), 4),
    }


DOORS = {
    "select": (select_blocks, ("q_index", "k_index")),
    "sparse": (sparse_attention, ("q", "k", "v", "selection")),
    "dense": (dense_attention, ("q", "k", "v")),
    "loss": (index_loss, ("q", "k", "q_index", "k_index", "selection")),
    "msa": (msa_attention, ("q", "k", "v", "q_index", "k_index")),
}


def call(door, **changes):
    run, names = DOORS[door]
    arguments = good()
    tensors = [changes.pop(name, arguments[name]) for name in names]
    return run(*tensors, **changes)


WRONG = [
    ("sparse", {"q": torch.zeros(8, 4, 8)}, r"q must be \[b, t, h, d\].*\(8, 4, 8\)"),
    ("dense", {"q": torch.zeros(2, 8, 3, 8)}, "3 heads of q must be a multiple of the 2 KV heads"),
    ("dense", {"q": torch.zeros(2, 8, 4, 7)}, "d is 7 in q but 8 in k"),
    ("dense", {"k": torch.zeros(1, 8, 2, 8)}, "b is 2 in q but 1 in k"),
    ("dense", {"v": torch.zeros(2, 9, 2, 8)}, "s is 8 in k but 9 in v"),
    ("dense", {"v": torch.zeros(2, 8, 1, 8)}, "g is 2 in k but 1 in v"),
    ("sparse", {"k": torch.zeros(2, 8, 2, 8).half()}, "k is torch.float16 but q is torch.float32"),
    ("dense", {"q": torch.zeros(2, 8, 4, 8).int()}, "q must be floating point"),
    ("dense", {"k": torch.zeros(2, 8, 2, 8, device="meta")}, "k is on meta but q is on cpu"),
    ("dense", {"q": torch.zeros(2, 9, 4, 8)}, "9 query tokens cannot be the last of 8 key tokens"),
    ("dense", {"scale": float("nan")}, "scale must be a finite number"),
    ("select", {"index_scale": float("inf")}, "index_scale must be a finite number"),
    ("select", {"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
    ("select", {"block_size": 4.0}, "block_size must be a whole number"),
    ("select", {"top_k": 0}, "top_k must be a whole number of at least 1"),
    ("select", {"top_k": True}, "top_k must be a whole number"),
    ("select", {"local_blocks": -1}, "local_blocks must be a whole number of at least 0"),
    ("select", {"top_k": 2, "sink_blocks": 2}, "top_k=2 cannot hold 3 blocks"),
    ("select", {"q_index": torch.zeros(2, 8, 2, 7)}, "d_index is 7 in q_index but 8 in k_index"),
    ("sparse", {"selection": torch.zeros(2, 2, 8, 3)}, "selection must be a Selection"),
    (
        "sparse",
        {"selection": Selection(torch.zeros(2, 2, 7, 3, dtype=torch.int32), 4)},
        "is for batch 2 and 7 query tokens, but q has batch 2 and 8",
    ),
    (
        "sparse",
        {"selection": Selection(torch.zeros(2, 3, 8, 3, dtype=torch.int32), 4)},
        "must have 1 or 2 or 4 groups",
    ),
    (
        "loss",
        {"selection": Selection(torch.zeros(2, 4, 8, 3, dtype=torch.int32), 4)},
        "must have 1 or 2 groups",
    ),
    ("loss", {"q_index": torch.zeros(2, 8, 4, 8)}, "q_index must be"),
    ("loss", {"k_index": torch.zeros(2, 7, 8)}, "k_index has 7 tokens but k has 8"),
    ("loss", {"row_weights": torch.ones(2, 7)}, r"row_weights must have shape \(2, 8\)"),
    ("loss", {"lse": torch.ones(2, 8, 2)}, r"lse must have shape \(2, 8, 4\)"),
    ("msa", {"phase": "sprase"}, "phase must be one of dense, warmup, sparse, got 'sprase'"),
    ("msa", {"top_k": 1, "local_blocks": 2}, "top_k=1 cannot hold"),
    ("dense", {"backend": "cudnn"}, "backend='cudnn' is unknown; usable on cpu: reference"),
    ("dense", {"backend": "triton"}, "backend='triton' is not usable on cpu"),
]


@pytest.mark.parametrize(("door", "changes", "message"), WRONG)
def test_refuses(door, changes, message):
    with pytest.raises(ValueError, match=message):
        call(door, **dict(changes))


@pytest.mark.parametrize("door", DOORS)
def test_accepts_what_fits(door):
    call(door)


def cu(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


BAD_BORDERS = [
    ({"cu_seqlens_k": cu(0, 8)}, "cu_seqlens_q is missing"),
    ({"cu_seqlens_q": cu(0, 3, 8), "cu_seqlens_k": cu(0, 8)}, "must have one length"),
    ({"cu_seqlens_q": cu(0, 8, dtype=torch.int64)}, "cu_seqlens_q must be int32"),
    ({"cu_seqlens_q": cu(0)}, r"int32 \[sequences \+ 1\]"),
    ({"cu_seqlens_q": cu(1, 8)}, "must start at 0"),
    ({"cu_seqlens_q": cu(0, 7)}, "end at the 8 tokens given, got 0 ... 7"),
    ({"cu_seqlens_q": cu(0, 5, 4, 8)}, "entry 1 is 5 and entry 2 is 4"),
    (
        {"cu_seqlens_q": cu(0, 5, 8), "cu_seqlens_k": cu(0, 4, 8)},
        "sequence 0 has 5 query tokens but only 4 key tokens",
    ),
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("where", "message"), BAD_BORDERS)
def test_refuses_bad_borders_at_every_door(door, where, message):
    one = {name: x[:1] for name, x in good().items() if isinstance(x, torch.Tensor)}
    if "selection" in DOORS[door][1]:
        one["selection"] = Selection(torch.zeros(1, 2, 8, 3, dtype=torch.int32), 4)
    tensors = {name: one[name] for name in DOORS[door][1]}
    with pytest.raises(ValueError, match=message):
        call(door, **tensors, **where)


def test_refuses_packing_in_a_batch():
    with pytest.raises(ValueError, match="packed sequences are batch 1, got batch 2"):
        call("dense", cu_seqlens_q=cu(0, 8))


def test_fewer_queries_than_keys_need_both_borders():
    q, k, v = torch.zeros(1, 3, 4, 8), torch.zeros(1, 8, 2, 8), torch.zeros(1, 8, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens_k is missing"):
        dense_attention(q, k, v, cu_seqlens_q=cu(0, 3))


@pytest.mark.parametrize("door", DOORS)
def test_shapes_alone_are_enough(door):
    """On the meta device nothing can be read, and every door still answers with the right shape."""
    meta = {}
    for name, x in good().items():
        if isinstance(x, Selection):
            meta[name] = Selection(x.blocks.to("meta"), x.block_size)
        else:
            meta[name] = x.to("meta")
    result = DOORS[door][0](*[meta[name] for name in DOORS[door][1]])
    for x in (result, getattr(result, "blocks", None), getattr(result, "out", None)):
        if isinstance(x, torch.Tensor):
            assert x.device.type == "meta"


def test_backends_say_why_they_are_not_usable():
    reasons = backends.availability()
    assert list(reasons) == list(backends.BACKENDS)
    assert reasons["reference"] is None
    assert reasons["portable"] is None
    assert all(reason is None or len(reason) > 10 for reason in reasons.values())


def test_backend_is_chosen_by_device_and_dtype():
    fastest = "portable" if backends.availability()["cpu"] else "cpu"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert backends.choose(None, "cpu", dtype) == fastest
        assert backends.choose(None, "cuda:1", dtype) == "portable"
        assert backends.choose(None, "meta", dtype) == "portable"
    assert backends.choose(None, "cpu", torch.float64) == "portable"
    assert backends.choose(None, "cpu", torch.float32, torch.float64) == "portable"


@pytest.mark.skipif(backends.availability()["cpu"] is not None, reason="no native kernels here")
@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", torch.float64, "it takes float32, float16, bfloat16, got torch.float64; convert"),
        ("cuda:0", torch.float32, "it reads tensors on the cpu, got cuda:0; move them"),
    ],
)
def test_cpu_backend_says_what_it_does_not_take(device, dtype, message):
    with pytest.raises(ValueError, match=message):
        backends.choose("cpu", device, dtype)
