"""mean_pool: the mean of every whole window, of one sequence or of packed ones."""

from __future__ import annotations

import math

import pytest
import torch

from openmsa.ops import checks, workspace
from openmsa.ops.pooled_selection import mean_pool, window_borders, windows
from tests.support import borders, seeded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (5, 3), (3, 3), (50, 1)])
def test_mean_pool_is_the_mean_of_every_whole_window(kernel, stride, dtype):
    k = seeded(2, 41, 3, 5, dtype=dtype)
    pooled, cu_pooled = mean_pool(k, kernel=kernel, stride=stride)
    first = range(0, 41 - kernel + 1, stride)
    truth = [k[:, i : i + kernel].double().mean(1) for i in first]
    truth = torch.stack(truth, 1) if truth else k.new_zeros(2, 0, 3, 5).double()
    assert cu_pooled is None
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, truth.to(dtype))


def test_mean_pool_of_packed_sequences():
    lengths = (9, 2, 0, 16, 4)
    k = seeded(1, sum(lengths), 2, 3)
    k[0, 9:11] = math.nan  # a sequence without a whole window
    pooled, cu_pooled = mean_pool(k, kernel=4, stride=2, cu_seqlens_k=borders(*lengths))
    assert cu_pooled.tolist() == [0, 3, 3, 3, 10, 11]
    assert torch.equal(cu_pooled, window_borders(borders(*lengths), 4, 2))
    alone = [mean_pool(x, kernel=4, stride=2)[0] for x in k.split(lengths, 1)]
    assert pooled.shape[1] == sum(lengths) // 2
    torch.testing.assert_close(pooled[:, :11], torch.cat(alone, 1))
    assert (pooled[:, 11:] == 0).all()


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (5, 3)])
def test_mean_pool_does_not_depend_on_pieces_or_on_reading_lengths(kernel, stride, monkeypatch):
    k, lengths = seeded(1, 90, 2, 8), borders(40, 3, 47)
    rule = {"kernel": kernel, "stride": stride}
    whole, packed = mean_pool(k, **rule)[0], mean_pool(k, **rule, cu_seqlens_k=lengths)[0]
    monkeypatch.setattr(windows, "PIECE_BYTES", 1)
    assert torch.equal(mean_pool(k, **rule)[0], whole)
    monkeypatch.setattr(checks, "readable", lambda borders: False)
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1)
    torch.testing.assert_close(mean_pool(k, **rule, cu_seqlens_k=lengths)[0], packed)


def test_mean_pool_passes_no_gradient():
    assert not mean_pool(seeded(1, 11, 2, 3, grad=True), kernel=4, stride=3)[0].requires_grad


def test_mean_pool_refuses_tokens_between_windows():
    with pytest.raises(ValueError, match="stride=5 must be at most kernel=4"):
        mean_pool(torch.zeros(1, 8, 2, 4), kernel=4, stride=5)


def test_mean_pool_refuses_borders_of_something_else():
    with pytest.raises(ValueError, match="cu_seqlens_k must ascend from 0 to the 8 tokens of k"):
        mean_pool(torch.zeros(1, 8, 2, 4), kernel=4, stride=2, cu_seqlens_k=borders(3, 4))
