"""DDP and FSDP2: the loss and gradients of several processes are those of one."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from openmsa import hf
from tests.hf.tiny import SPARSE, tiny_model, tiny_tokens
from tests.processes import together
from tests.support import assert_as_good_as_eager

ROWS = 9
# Rows of every process and micro-batch: uneven, and padded each to its own length.
SHARED = {
    2: [[[0], [1, 2, 3]], [[4, 5, 8], [6, 7]]],
    4: [[[0], [1]], [[2, 3], [4]], [[5], [6]], [[7], [8]]],
}


def batch(rows=range(ROWS)) -> dict[str, torch.Tensor]:
    ids, mask = tiny_tokens(ROWS, 33), torch.ones(ROWS, 33, dtype=torch.long)
    for row in range(ROWS):
        mask[row, 33 - 3 * row :] = 0
    mask[0] = 1
    whole = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: x[list(rows)] for name, x in whole.items()}


def totals() -> dict[str, int]:
    """Of a whole step, over all processes and micro-batches."""
    whole = batch()
    labels = whole["labels"][:, 1:] != -100
    return {
        "num_items_in_batch": int(labels.sum()),
        "index_rows_in_batch": int(whole["attention_mask"].sum()),
    }


def trained(phase: str, frozen: bool, dtype=torch.float32, checkpointed=False):
    model = hf.convert(tiny_model(), SPARSE, init="random").to(dtype).train()
    hf.set_phase(model, phase, index_loss_weight=0.5)
    hf.freeze_backbone(model, frozen)
    if checkpointed:
        enable = getattr(model, "activation_checkpointing_enable", None)
        name = "activation_checkpointing_kwargs" if enable else "gradient_checkpointing_kwargs"
        enable = enable or model.gradient_checkpointing_enable
        enable(**{name: {"use_reentrant": False}})
    return model


def alone(*how, **more) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = trained(*how, **more)
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def with_ddp(model):
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    return wrapped, lambda last: setattr(wrapped, "require_backward_grad_sync", last)


def with_fsdp(model, policy=None):
    how = {} if policy is None else {"mp_policy": policy}
    for layer in model.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    return model, lambda last: model.set_requires_gradient_sync(last)


WRAPS = {"ddp": with_ddp, "fsdp": with_fsdp}


def step(rank: int, wrapped, sync) -> torch.Tensor:
    """One optimizer step's micro-batches of this process; returns the step's loss."""
    size = dist.get_world_size()
    mine, total = SHARED[size][rank], torch.zeros(())
    for number, rows in enumerate(mine):
        sync(number == len(mine) - 1)
        loss = wrapped(**batch(rows), **totals(), use_cache=False).loss
        (loss * size).backward()  # both wrappers average over processes
        total += loss.detach()
    dist.all_reduce(total)
    return total


def whole_gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def check(rank: int, wrap: str, phase: str, frozen: bool, checkpointed: bool = False) -> None:
    what = f"{wrap}, {phase}, {'frozen' if frozen else 'free'}"
    truth, single = (alone(phase, frozen, dtype=d) for d in (torch.float64, torch.float32))
    model = trained(phase, frozen, checkpointed=checkpointed)
    wrapped, sync = WRAPS[wrap](model)
    for _ in range(2):  # a second step finds nothing left behind by the first
        model.zero_grad()
        total = step(rank, wrapped, sync)
        assert_as_good_as_eager(total, single[0], truth[0], what)
        found = whole_gradients(model)
        assert found.keys() == single[1].keys(), what
        for name, gradient in found.items():
            assert_as_good_as_eager(gradient, single[1][name], truth[1][name], f"{what}: {name}")


def shortly(rank: int) -> None:
    check(rank, "ddp", "sparse", frozen=False)
    check(rank, "fsdp", "sparse", frozen=False)
    check(rank, "fsdp", "warmup", frozen=True)
    in_bf16(rank)
    without_a_root()


def at_length(rank: int) -> None:
    for wrap in WRAPS:
        for phase in ("warmup", "sparse"):
            for frozen in (False, True):
                for checkpointed in (False, True):
                    check(rank, wrap, phase, frozen, checkpointed)
    in_bf16(rank)


def without_a_root() -> None:
    """Layers alone would never hand over the gradients of an index loss that comes alone."""
    model = trained("warmup", frozen=True)
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(ValueError, match="call fully_shard on the model "):
        model(**batch([0]))
    hf.freeze_backbone(model, frozen=False)
    model(**batch([0])).loss.backward()


def in_bf16(rank: int) -> None:
    """FSDP2's own mixed precision casts what goes into a layer, and must not lose the losses."""
    expected = alone("warmup", False)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    wrapped, sync = with_fsdp(trained("warmup", False), policy)
    total = step(rank, wrapped, sync)
    torch.testing.assert_close(total, expected[0], atol=0.02, rtol=0.02)
    found = whole_gradients(wrapped)
    assert found.keys() == expected[1].keys()
    for name, gradient in found.items():
        assert (gradient - expected[1][name]).norm() < 0.3 * expected[1][name].norm(), name


def test_two_processes_are_one(tmp_path):
    together(2, tmp_path, shortly)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_processes_are_one_in_every_phase(size, tmp_path):
    together(size, tmp_path, at_length)
