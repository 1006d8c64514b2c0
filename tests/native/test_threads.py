"""Results depend neither on the number of threads nor on the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from openmsa.ops import native_calls
from tests.native.workload import differing, everything
from tests.support import borders, every_instruction_set, index_qk, qkv, seeded


@pytest.fixture
def threads(monkeypatch) -> Iterator:
    """torch.set_num_threads, for calls of any size, put back afterwards."""
    before = torch.get_num_threads()
    monkeypatch.setattr(native_calls, "_ONE_THREAD", 0)
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = {
    "batch": ({"b": 2, "t": 150, "s": 170, "h": 6, "g": 3, "d": 24, "dv": 40}, {}),
    "decode": ({"b": 3, "t": 1, "s": 700, "h": 8, "g": 2, "d": 32}, {}),
    "packed": (
        {"b": 1, "t": 150, "s": 170, "h": 4, "g": 1, "d": 16},
        {"cu_seqlens_q": borders(3, 0, 100, 47), "cu_seqlens_k": borders(20, 3, 100, 47)},
    ),
}


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_do_not_depend_on_threads(backend, threads, dtype, shape):
    sizes, where = SHAPES[shape]
    b, t, s, g = (sizes[name] for name in "btsg")
    tensors = (*qkv(**sizes, dtype=dtype), *index_qk(b, t, s, g, 20, dtype=dtype))
    rule = {"block_size": 16, "top_k": 4, "row_weights": seeded(b, t).abs(), **where}
    threads(1)
    alone = everything(tensors, **rule)
    for count in (1, 2, 3, 4, 7):
        threads(count)
        assert differing(alone, everything(tensors, **rule)) == [], f"{count} threads"


@every_instruction_set
def test_a_crowded_block_does_not_depend_on_threads(backend, threads):
    """Every query reads block 0: its dk and dv are sums over all of them."""
    tensors = (*qkv(1, 300, 300, 8, 2, 16), *index_qk(1, 300, 300, 2, 16))
    blocks = torch.full((1, 2, 300, 3), -1, dtype=torch.int32)
    blocks[..., 0] = 0
    blocks[:, 1, 100:, 1] = 3
    rule = {"block_size": 16, "top_k": 4, "blocks": blocks}
    threads(1)
    alone = everything(tensors, **rule)
    for count in (2, 3, 7):
        threads(count)
        assert differing(alone, everything(tensors, **rule)) == [], f"{count} threads"


def test_small_calls_stay_on_one_thread_and_large_ones_follow_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert native_calls.threads(1000) == 1
        assert native_calls.threads(10**9) == 3
    finally:
        torch.set_num_threads(before)
