"""A converted model on a batch shared token by token: the loss and gradients of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

import openmsa
from openmsa import hf
from openmsa.ops.context_parallel import gather_tokens
from tests.hf.mechanisms import SMALL, WITH_INDEX
from tests.hf.tiny import SPARSE, tiny_model, tiny_tokens
from tests.processes import together
from tests.support import assert_as_good_as_eager

MIXED = openmsa.MSAConfig(block_size=4, top_k=3, layers=(0, 2))


def padded(side: str) -> dict[str, torch.Tensor]:
    ids, mask = tiny_tokens(3, 37), torch.ones(3, 37, dtype=torch.long)
    for row, missing in enumerate((0, 14, 36)):
        mask[row, slice(0, missing) if side == "left" else slice(37 - missing, 37)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # what padding would predict is nobody's label
        labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def packed() -> dict[str, torch.Tensor]:
    ids = tiny_tokens(1, 53)
    position_ids = torch.cat([torch.arange(n) for n in (17, 1, 35)])[None]
    return {"input_ids": ids, "position_ids": position_ids, "labels": ids}


def plain() -> dict[str, torch.Tensor]:
    ids = tiny_tokens(2, 41)
    return {"input_ids": ids, "labels": ids}


BATCHES = {
    "plain": plain(),
    "packed": packed(),
    "left": padded("left"),
    "right": padded("right"),
    "borders": {
        "input_ids": tiny_tokens(1, 53),
        "labels": tiny_tokens(1, 53),
        "cu_seq_lens_q": torch.tensor([0, 17, 18, 53], dtype=torch.int32),
    },
}


def trained(phase: str, config=SPARSE, dtype=torch.float32, frozen=False):
    model = hf.convert(tiny_model(), config, init="random").to(dtype).train()
    hf.set_phase(model, phase, index_loss_weight=0.5)
    if frozen:
        hf.freeze_backbone(model)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alone(batch, *how, **more):
    """Loss, index loss and gradients of one process that holds the whole batch."""
    model = trained(*how, **more)
    out = model(**batch)
    out.loss.backward()
    index_loss = getattr(out, "index_loss", torch.zeros(0))
    return out.loss.detach(), index_loss.detach(), gradients(model)


def total(found: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, which adds no rounding of its own."""
    found = found.detach().double()
    dist.all_reduce(found)
    return found.float()


def check(batch: dict, phase: str, what: str, **more) -> None:
    truth, single = (alone(batch, phase, dtype=d, **more) for d in (torch.float64, torch.float32))
    model = trained(phase, **more)
    inputs = hf.split_context(batch)
    out = model(**inputs)
    out.loss.backward()
    index_loss = getattr(out, "index_loss", torch.zeros(0))
    share = inputs["context"].num_queries / inputs["context"].num_tokens
    assert_as_good_as_eager(total(out.loss), single[0], truth[0], f"{what}: loss")
    torch.testing.assert_close(total(index_loss.double() * share), truth[1].float())
    found = gradients(model)
    assert found.keys() == single[2].keys(), what
    for name, gradient in found.items():
        dist.all_reduce(gradient)
        assert_as_good_as_eager(gradient, single[2][name], truth[2][name], f"{what}: {name}")


def every_batch(rank: int) -> None:
    for name, batch in BATCHES.items():
        for phase in ("warmup", "sparse"):
            check(batch, phase, f"{name}, {phase}")
        check(batch, "sparse", f"{name}, mixed", config=MIXED)
    check(BATCHES["plain"], "warmup", "frozen", frozen=True)


def every_mechanism(rank: int) -> None:
    for name, config in SMALL.items():
        for phase in ("sparse", "warmup") if name in WITH_INDEX else ("sparse",):
            check(BATCHES["right"], phase, f"{name}, {phase}", config=config)


def one_batch(rank: int) -> None:
    check(BATCHES["packed"], "sparse", "packed, mixed", config=MIXED)
    check(BATCHES["right"], "warmup", "right, frozen", frozen=True)
    refusals()
    logits()


def logits() -> None:
    """In evaluation, the logits of all processes are those of the row."""
    model, batch = trained("sparse").eval(), BATCHES["packed"]
    with torch.no_grad():
        expected = model(**batch).logits
        inputs = hf.split_context(batch)
        (found,) = gather_tokens(inputs["context"], model(**inputs).logits)
    torch.testing.assert_close(found[:, :53], expected, atol=3e-5, rtol=1e-4)


def refusals() -> None:
    model, inputs = trained("sparse"), hf.split_context(BATCHES["plain"])
    with pytest.raises(ValueError, match="attention_mask cannot come with a context"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    with pytest.raises(ValueError, match="pixel_values cannot be shared over a context"):
        hf.split_context({**plain(), "pixel_values": torch.zeros(1)})
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    window = tiny_model(layer_types=kinds, sliding_window=8, use_sliding_window=True)
    window = hf.convert(window, openmsa.MSAConfig(block_size=4, top_k=3, layers=(1, 2)))
    with pytest.raises(ValueError, match="layer 0 stays dense with a sliding window of 8"):
        window(**inputs)


def test_a_shared_batch_is_the_batch(tmp_path):
    together(2, tmp_path, one_batch)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_kind_of_batch_can_be_shared(size, tmp_path):
    together(size, tmp_path, every_batch)


@pytest.mark.slow
def test_every_mechanism_can_share_a_batch(tmp_path):
    together(2, tmp_path, every_mechanism)
