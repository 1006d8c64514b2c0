"""An enabled MiniMax-M3, experts and all, over several processes: the loss and gradients of one."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from openmsa import hf
from tests.hf.m3_tiny import tiny_m3
from tests.hf.tiny import tiny_tokens
from tests.processes import together

CLOSE = {"atol": 2e-5, "rtol": 1e-3}


def trained():
    return hf.enable(tiny_m3()).train()


def batch() -> dict[str, torch.Tensor]:
    ids = tiny_tokens(2, 45) % 50
    return {"input_ids": ids, "labels": ids}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def assert_same(loss: torch.Tensor, found: dict, expected: tuple) -> None:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, expected[0], **CLOSE)
    assert found.keys() == expected[1].keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[1][name], msg=name, **CLOSE)


def body(rank: int) -> None:
    model = trained()
    loss = model(**batch()).loss
    loss.backward()
    expected = loss.detach(), gradients(model)

    model = trained()
    loss = model(**hf.split_context(batch())).loss
    loss.backward()
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
    assert_same(loss, found, expected)

    model = trained()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    row = {name: x[rank : rank + 1] for name, x in batch().items()}
    loss = model(**row, num_items_in_batch=2 * 44, index_rows_in_batch=2 * 45).loss
    (2 * loss).backward()
    assert_same(loss, gradients(model), expected)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    together(2, tmp_path, body)
