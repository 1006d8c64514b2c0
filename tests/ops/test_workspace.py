"""How the work is cut up changes nothing: tiny workspaces, skewed selections, any tile width."""

from __future__ import annotations

import pytest
import torch

from openmsa import Selection, dense_attention, index_loss, select_blocks, sparse_attention
from openmsa.ops import tiles, workspace
from openmsa.ops.block_selection import portable as selection_portable
from tests.support import borders, index_qk, qkv, seeded


@pytest.fixture(params=[1, 3000, 40000], ids=["one at a time", "few", "some"])
def small_workspace(request, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", request.param)
    monkeypatch.setattr(workspace, "CACHE_BYTES", request.param)
    monkeypatch.setattr(selection_portable, "KEYS_AT_ONCE", 8)


def everything(backend, **packed):
    b = 1 if packed else 2
    q, k, v = qkv(b, 43, 50, 4, 2, 8, dtype=torch.float64, grad=True)
    q_index, k_index = index_qk(b, 43, 50, 2, 8, dtype=torch.float64, grad=True)
    rule = {"backend": backend, **packed}
    selection = select_blocks(q_index, k_index, block_size=4, top_k=5, **rule)
    dout = seeded(b, 43, 4, 8, seed=5, dtype=torch.float64)
    results = [selection.blocks]
    for out, lse in (
        sparse_attention(q, k, v, selection, return_lse=True, **rule),
        dense_attention(q, k, v, return_lse=True, **rule),
    ):
        results += [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    for chosen in (selection, None):
        loss = index_loss(q, k, q_index, k_index, chosen, **rule)
        results += [loss, *torch.autograd.grad(loss, (q_index, k_index))]
    return results


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_cutting_changes_nothing(small_workspace, packed):
    where = {"cu_seqlens_q": borders(7, 0, 36), "cu_seqlens_k": borders(9, 2, 39)} if packed else {}
    for ours, definition in zip(everything("portable", **where), everything("reference", **where)):
        torch.testing.assert_close(ours, definition)


def test_tiles_of_a_device_whose_counts_cannot_be_read(monkeypatch):
    """A GPU takes a bound for the number of tiles; the tiles too many must add nothing."""
    monkeypatch.setattr(tiles, "_count", lambda last_tile, bound: bound)
    for ours, definition in zip(everything("portable"), everything("reference")):
        torch.testing.assert_close(ours, definition)


@pytest.mark.parametrize("heads", [1, 4, 256])
def test_everybody_wants_the_same_block(heads):
    """One row of keys with every query, the others with none: the fullest and emptiest tiles."""
    q, k, v = qkv(1, 60, 60, heads, 1, 4, dtype=torch.float64)
    blocks = torch.full((1, 1, 60, 2), -1, dtype=torch.int32)
    blocks[..., 0] = 0
    selection = Selection(blocks, 4)
    torch.testing.assert_close(
        sparse_attention(q, k, v, selection, backend="portable"),
        sparse_attention(q, k, v, selection, backend="reference"),
    )


def test_budget_is_kept_for_the_largest_rows():
    device = torch.device("cpu")
    assert workspace.rows_at_once(workspace.WORKSPACE_BYTES * 2, device) == 1
    assert workspace.rows_at_once(1 << 20, device, wanted=10**9) * (1 << 20) <= (
        workspace.WORKSPACE_BYTES
    )
