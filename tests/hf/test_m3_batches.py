"""Padded and packed batches of an enabled MiniMax-M3 are each sequence alone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from openmsa import hf
from tests.hf.m3_tiny import tiny_m3
from tests.hf.test_batches import CLOSE, LENGTHS, alone, padded, positions, sequences
from tests.hf.tiny import CACHE, logits, tiny_tokens


@pytest.fixture(scope="module")
def model():
    return hf.enable(tiny_m3())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_sequence_alone(model, side):
    ids, mask = padded(sequences(), side)
    expected = alone(tiny_m3(), sequences())  # transformers is right about one sequence
    for position_ids in (None, positions(mask)):
        got = logits(model, ids, attention_mask=mask, position_ids=position_ids)
        for row, truth in enumerate(expected):
            torch.testing.assert_close(got[row][mask[row].bool()], truth, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_padded_batch_goes_on_as_each_sequence_alone(model, side, kind):
    more = 9
    ids, mask = padded(sequences(), side)
    rest = tiny_tokens(len(LENGTHS), more, seed=9)
    dynamic = kind == "dynamic"
    cache = DynamicCache() if dynamic else StaticCache(config=model.config, max_cache_len=64)
    logits(model, ids, attention_mask=mask, position_ids=positions(mask), **{CACHE: cache})
    got = []
    for new in rest.split([1, 3, 5], 1):
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        at = positions(mask)[:, -new.shape[1] :]
        got.append(logits(model, new, attention_mask=mask, position_ids=at, **{CACHE: cache}))
    got = torch.cat(got, 1)
    for row, sequence in enumerate(sequences()):
        expected = logits(model, torch.cat([sequence, rest[row]])[None])[0, -more:]
        torch.testing.assert_close(got[row], expected, **CLOSE)


@pytest.mark.parametrize("marked", ["position_ids", "cu_seq_lens", "both"])
def test_packed_sequences_are_each_alone(model, marked):
    rows = sequences()
    batch = DataCollatorWithFlattening(
        return_position_ids=marked != "cu_seq_lens",
        return_flash_attn_kwargs=marked != "position_ids",
    )([{"input_ids": row.tolist()} for row in rows])
    batch.pop("labels")
    got = logits(model, **batch)[0].split(LENGTHS)
    for part, expected in zip(got, alone(tiny_m3(), rows), strict=True):
        torch.testing.assert_close(part, expected, **CLOSE)


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
@pytest.mark.parametrize("form", ["left", "packed"])
def test_training_on_a_batch_is_training_on_each_sequence(model, phase, form):
    """The index loss of a batch is the token-weighted mean of its sequences', gradients too."""
    trained, rows = copy.deepcopy(model).train(), sequences()
    hf.set_phase(trained, phase)
    total, index_total = 0.0, 0.0
    for row in rows:
        out = trained(row[None], labels=row[None], num_items_in_batch=107)
        index_total = index_total + out["index_loss"] * len(row) / sum(LENGTHS)
        if len(row) > 1:
            total = total + out["lm_loss"]
    (total + index_total.sum()).backward()
    expected = {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
    trained.zero_grad()
    if form == "packed":
        batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    else:
        ids, mask = padded(rows, form)
        labels = ids.masked_fill(mask == 0, -100)
        labels[torch.arange(len(rows)), mask.argmax(1)] = -100
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    out = trained(**batch)
    torch.testing.assert_close(out["index_loss"], index_total)
    torch.testing.assert_close(out.loss, total + index_total.sum())
    out.loss.backward()
    for name, gradient in expected.items():
        found = trained.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, atol=2e-5, rtol=1e-3)


def test_no_mask_of_queries_by_keys_is_made(model):
    """Every tensor of a padded forward pass and its backward stays far below t * s elements."""
    largest = _Largest()
    tokens = 1024
    big = hf.enable(tiny_m3(max_position_embeddings=tokens, num_attention_heads=2)).train()
    ids = tiny_tokens(1, tokens)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    with largest:
        big(ids, attention_mask=mask, labels=ids).loss.backward()
    assert largest.elements < tokens * tokens / 4


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out
