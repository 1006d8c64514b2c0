"""Padded and packed batches are each sequence alone: blocks start at its first real token."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

import openmsa
from openmsa import hf
from openmsa.hf.layout import find_layout
from tests.hf.tiny import CACHE, FAMILIES, SPARSE, logits, tiny_model, tiny_tokens

LENGTHS = (37, 50, 1, 23)  # none a multiple of the block size, one a single token
CLOSE = {"atol": 3e-5, "rtol": 1e-4}
MIXED = openmsa.MSAConfig(block_size=4, top_k=3, layers=(0, 2))


def sequences() -> list[torch.Tensor]:
    return [tiny_tokens(n, seed=i) for i, n in enumerate(LENGTHS)]


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask.long()


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def alone(model, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [logits(model, row[None])[0] for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [SPARSE, MIXED], ids=["all", "mixed"])
def test_a_padded_batch_is_each_sequence_alone(family, side, config):
    model = hf.convert(tiny_model(family), config)
    ids, mask = padded(sequences(), side)
    for position_ids in (None, positions(mask)):
        got = logits(model, ids, attention_mask=mask, position_ids=position_ids)
        for row, expected in enumerate(alone(model, sequences())):
            torch.testing.assert_close(got[row][mask[row].bool()], expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("config", [SPARSE, MIXED], ids=["all", "mixed"])
def test_a_padded_batch_goes_on_as_each_sequence_alone(side, chunk, config):
    """After right padding the mask has holes: padding in the middle of what the cache holds."""
    model, more = hf.convert(tiny_model(), config), 9
    ids, mask = padded(sequences(), side)
    rest = tiny_tokens(len(LENGTHS), more, seed=9)
    cache = DynamicCache()
    logits(model, ids, attention_mask=mask, position_ids=positions(mask), **{CACHE: cache})
    got = []
    for start in range(0, more, chunk):
        new = rest[:, start : start + chunk]
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        at = positions(mask)[:, -new.shape[1] :]
        got.append(logits(model, new, attention_mask=mask, position_ids=at, **{CACHE: cache}))
    got = torch.cat(got, 1)
    for row, sequence in enumerate(sequences()):
        expected = logits(model, torch.cat([sequence, rest[row]])[None])[0, -more:]
        torch.testing.assert_close(got[row], expected, **CLOSE)


def test_a_padded_batch_of_chunks_with_padding_inside():
    """The second chunk is padded as well: row 0 ends early, row 1 pauses."""
    model = hf.convert(tiny_model(), SPARSE)
    ids = tiny_tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 30:], mask[1, 25:28] = 0, 0
    cache = DynamicCache()
    for part in (slice(0, 22), slice(22, 40)):
        at = positions(mask)[:, part]
        got = logits(
            model,
            ids[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=at,
            **{CACHE: cache},
        )
    for row in range(2):
        real = mask[row].bool()
        expected = logits(model, ids[row][real][None])[0]
        torch.testing.assert_close(got[row][real[22:]], expected[int(real[:22].sum()) :], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("marked", ["position_ids", "cu_seq_lens", "both", "two rows"])
@pytest.mark.parametrize("config", [SPARSE, MIXED], ids=["all", "mixed"])
def test_packed_sequences_are_each_alone(family, marked, config):
    model, rows = hf.convert(tiny_model(family), config), sequences()
    features = [{"input_ids": row.tolist()} for row in rows]
    batch = DataCollatorWithFlattening(
        return_position_ids=marked != "cu_seq_lens",
        return_flash_attn_kwargs=marked != "position_ids",
    )(features)
    batch.pop("labels")
    if marked == "two rows":
        batch = {
            "input_ids": torch.stack([torch.cat(rows), torch.cat(rows[::-1])]),
            "position_ids": torch.stack([_restarting(rows), _restarting(rows[::-1])]),
        }
        rows = rows + rows[::-1]
    got = logits(model, **batch).flatten(0, 1)
    for part, expected in zip(
        got.split([len(row) for row in rows]), alone(model, rows), strict=True
    ):
        torch.testing.assert_close(part, expected, **CLOSE)


def _restarting(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.arange(len(row)) for row in rows])


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
@pytest.mark.parametrize("form", ["left", "right", "packed"])
def test_training_on_a_batch_is_training_on_each_sequence(phase, form):
    """The index loss of a batch is the token-weighted mean of its sequences', gradients too."""
    model, rows = hf.convert(tiny_model(), SPARSE).train(), sequences()
    hf.set_phase(model, phase)
    total, index_total = 0.0, 0.0
    for row in rows:
        out = model(row[None], labels=row[None], num_items_in_batch=107)
        index_total = index_total + out["index_loss"] * len(row) / sum(LENGTHS)
        if len(row) > 1:  # a single token predicts nothing
            total = total + out["lm_loss"]
    (total + index_total.sum()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    if form == "packed":
        batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    else:
        ids, mask = padded(rows, form)
        labels = ids.masked_fill(mask == 0, -100)
        if form == "left":  # the token before the first real one would predict it
            labels[torch.arange(len(rows)), mask.argmax(1)] = -100
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    out = model(**batch)
    torch.testing.assert_close(out["lm_loss"], total)
    torch.testing.assert_close(out["index_loss"], index_total)
    torch.testing.assert_close(out.loss, total + index_total.sum())
    out.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=1e-3)


def test_the_inner_model_finds_padding_and_packing_by_itself():
    """model.model(...) does not pass through the language model that finds the layout."""
    model, rows = hf.convert(tiny_model(), SPARSE), sequences()
    ids, mask = padded(rows, "left")
    with torch.no_grad():
        states = model.model(ids, attention_mask=mask).last_hidden_state
        packed = model.model(
            torch.cat(rows)[None], position_ids=_restarting(rows)[None], use_cache=False
        ).last_hidden_state[0]
    parts = packed.split(LENGTHS)
    for row, expected in enumerate(alone(model, rows)):
        for state in (states[row][mask[row].bool()], parts[row]):
            torch.testing.assert_close(model.lm_head(state), expected, **CLOSE)


def test_no_padding_is_left_alone():
    shape = {"batch": 2, "num_queries": 5, "num_cached": 0}
    assert find_layout(**shape) is None
    assert find_layout(**shape, attention_mask=torch.ones(2, 5)) is None
    assert find_layout(**shape, position_ids=torch.arange(3, 8)[None]) is None
    layout = find_layout(
        batch=2, num_queries=1, num_cached=4, attention_mask=_mask("00111", "00111")
    )
    assert len(layout.spans) == 1  # both rows in one call
    assert (
        find_layout(batch=1, num_queries=1, num_cached=4, attention_mask=_mask("10011")).spans
        is None
    )


def _mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(slot) for slot in row] for row in rows])


def test_a_row_of_nothing_but_padding_is_harmless():
    model, ids = hf.convert(tiny_model(), SPARSE), tiny_tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1] = 0
    got = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(got[0], logits(model, ids[:1])[0], **CLOSE)
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 1, 20, 20)},
            r"got shape \(2, 1, 20, 20\): a custom mask",
        ),
        ({"attention_mask": torch.ones(2, 21)}, r"must be \[2, 20\] here .* got \(2, 21\)"),
        ({"attention_mask": {"full_attention": None}}, "must be a tensor .* got dict"),
        ({"cu_seq_lens_q": torch.tensor([0, 20])}, "needs batch 1"),
        ({"output_attentions": True}, "use openmsa.hf.capture_attention"),
        ({"is_causal": False}, "block selection is causal"),
    ],
)
def test_what_cannot_be_followed_is_refused(inputs, message):
    model = hf.convert(tiny_model(), SPARSE)
    with pytest.raises(ValueError, match=message):
        model(tiny_tokens(2, 20), **inputs)


def test_packed_sequences_cannot_be_wrong_or_cached():
    model, ids = hf.convert(tiny_model(), SPARSE), tiny_tokens(1, 20)
    with pytest.raises(ValueError, match="must rise from 0 to the 20 tokens"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 7, 19]))
    restarting = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with pytest.raises(ValueError, match="packed sequences cannot be cached"):
        model(ids, position_ids=restarting, **{CACHE: DynamicCache()})
    cache = DynamicCache()
    logits(model, ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="cannot continue a cache"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 7, 20]), **{CACHE: cache})


def test_a_sequence_longer_than_the_model_is_refused():
    model = hf.convert(tiny_model(max_position_embeddings=32), SPARSE)
    with pytest.raises(ValueError, match="33 tokens is longer than the 32 positions"):
        model(tiny_tokens(1, 33))
    with pytest.raises(ValueError, match="longer than the 32 positions"):
        model.generate(tiny_tokens(1, 30), max_new_tokens=5, do_sample=False)
    packed = torch.cat([torch.arange(30), torch.arange(30)])[None]
    logits(model, tiny_tokens(1, 60), position_ids=packed)
    model.config.max_position_embeddings = 64
    logits(model, tiny_tokens(1, 33))
