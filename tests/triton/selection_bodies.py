"""What only the triton backend does in choosing blocks; run by test_interpreter.py, or on a GPU."""

from __future__ import annotations

import math
from importlib.metadata import version

import pytest
import torch

from openmsa import select_blocks
from openmsa.ops import gpu as gpus
from openmsa.ops.block_selection import triton as door
from tests.support import borders, index_qk

pytestmark = pytest.mark.skipif(gpus.unavailable() is not None, reason=str(gpus.unavailable()))


def interpreted_by_an_old_triton() -> bool:
    if gpus.unavailable() is not None or not gpus.interpreted():
        return False
    return tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 9)


def both(q_index, k_index, **rule):
    """Blocks from triton and from the definition."""
    device = "cpu" if gpus.interpreted() else "cuda"
    ours = select_blocks(q_index.to(device), k_index.to(device), **rule, backend="triton")
    return ours.blocks.cpu(), select_blocks(q_index, k_index, **rule, backend="reference").blocks


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_triton_merges_splits_exactly(monkeypatch, splits, top_k):
    monkeypatch.setattr(door, "_splits", lambda *shape: splits)
    q_index, k_index = (x.round() for x in index_qk(2, 3, 61, 2, 2))  # many equal scores
    k_index[:, 4::9] = math.nan
    ours, truth = both(q_index, k_index, block_size=4, top_k=top_k)
    assert torch.equal(ours, truth)


def test_triton_splits_packed_sequences(monkeypatch):
    monkeypatch.setattr(door, "_splits", lambda *shape: 3)
    q_index, k_index = index_qk(1, 7, 70, 2, 4)
    packed = {"cu_seqlens_q": borders(2, 0, 4, 1), "cu_seqlens_k": borders(31, 3, 35, 1)}
    ours, truth = both(q_index, k_index, block_size=4, top_k=3, **packed)
    assert torch.equal(ours, truth)


@pytest.mark.parametrize("d_index", [16, 24, 80, 200])
@pytest.mark.parametrize(("block_size", "top_k"), [(16, 64), (48, 5), (160, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_takes_any_size(d_index, block_size, top_k, dtype):
    q_index, k_index = index_qk(1, 5, 5 * block_size + 3, 3, d_index, dtype=dtype)
    ours, truth = both(q_index, k_index, block_size=block_size, top_k=top_k, sink_blocks=1)
    assert torch.equal(ours, truth)


def test_triton_reads_keys_of_any_stride():
    q_index, k_index = index_qk(2, 9, 40, 2, 8)
    wide = torch.full((2, 40, 3, 8), math.nan)
    wide[:, :, 1] = k_index
    ours, truth = both(q_index, wide[:, :, 1], block_size=4, top_k=3)
    assert torch.equal(ours, truth)


@pytest.mark.skipif(interpreted_by_an_old_triton(), reason="its interpreter misreads fp8 products")
@pytest.mark.parametrize("t", [1, 70])
def test_triton_reads_fp8(t):
    """Products of e4m3 are exact in fp32; a chip may sum them in fewer digits."""
    q_index, k_index = (x.to(torch.float8_e4m3fn) for x in index_qk(1, t, 300, 4, 32))
    ours, truth = both(q_index, k_index, block_size=16, top_k=4)
    assert (ours != truth).float().mean() <= (0 if gpus.interpreted() else 0.01)


def test_triton_compiles_without_a_break():
    q_index, k_index = index_qk(1, 9, 20, 2, 4)
    device = "cpu" if gpus.interpreted() else "cuda"
    rule = {"block_size": 4, "top_k": 3, "backend": "triton"}
    run = torch.compile(
        lambda q, k: select_blocks(q, k, **rule).blocks, fullgraph=True, backend="eager"
    )
    made = run(q_index.to(device), k_index.to(device)).cpu()
    assert torch.equal(made, both(q_index, k_index, block_size=4, top_k=3)[1])
