"""Training with every mechanism: losses and gradients go where the headers say."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

from openmsa import hf
from tests.hf.mechanisms import SMALL, WITH_INDEX, converted, sequences
from tests.hf.tiny import tiny_model, tiny_tokens

every_mechanism = pytest.mark.parametrize("name", SMALL)


def gradients(model) -> dict[str, torch.Tensor | None]:
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


@every_mechanism
def test_the_dense_phase_is_the_dense_model_in_training(name):
    dense, ids = tiny_model().train(), tiny_tokens(2, 40)
    expected = dense(ids, labels=ids)
    expected.loss.backward()
    model = converted(name).train()
    hf.set_phase(model, "dense")
    out = model(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    found = gradients(model)
    for parameter, gradient in ((n, p.grad) for n, p in dense.named_parameters()):
        torch.testing.assert_close(found[parameter], gradient, atol=2e-5, rtol=1e-3)
    assert all(found[n] is None or not found[n].any() for n, _ in hf.added_parameters(model))


@every_mechanism
def test_training_on_a_packed_batch_is_training_on_each_sequence(name):
    model, rows = converted(name).train(), [row for row in sequences() if len(row) > 1]
    tokens = sum(len(row) for row in rows)
    for row in rows:
        shares = {"num_items_in_batch": tokens - len(rows), "index_rows_in_batch": tokens}
        model(row[None], labels=row[None], **shares).loss.backward()
    expected = gradients(model)
    batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    model(**batch).loss.backward()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], atol=2e-5, rtol=1e-3)


@every_mechanism
def test_gradients_reach_what_the_header_says(name):
    model, ids = converted(name).train(), tiny_tokens(2, 40)
    added = {n for n, _ in hf.added_parameters(model)}
    assert bool(added) == (name in (*WITH_INDEX, "nsa"))
    out = model(ids, labels=ids)
    assert ("index_loss" in out) == (name in WITH_INDEX)
    if name not in WITH_INDEX:
        out.loss.backward()
        assert all(g is not None and g.any() for g in gradients(model).values())
        return
    out["index_loss"].sum().backward(retain_graph=True)
    by_index = gradients(model)
    assert {n for n, g in by_index.items() if g is not None and g.any()} == added
    out["lm_loss"].backward()
    by_lm = gradients(model)
    assert {n for n, g in by_lm.items() if g is None} == added
    assert {n for n, _ in hf.index_parameters(model)} == added


@every_mechanism
def test_checkpointed_layers_and_autocast_compute_the_same(name):
    model, ids = converted(name).train(), tiny_tokens(2, 40)
    plain = model(ids, labels=ids)
    plain.loss.backward()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids, labels=ids)
    torch.testing.assert_close(rough.loss, plain.loss, atol=0.1, rtol=0.05)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(**{f"{enable.__name__.removesuffix('_enable')}_kwargs": {"use_reentrant": False}})
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert torch.equal(out.loss, plain.loss)
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter])


@every_mechanism
def test_phases_and_frozen_backbones_are_those_that_make_sense(name):
    model, ids = converted(name).train(), tiny_tokens(1, 40)
    if name in WITH_INDEX:
        hf.set_phase(model, "warmup")
        assert model(ids)["index_loss"].shape == (3,)
    else:
        with pytest.raises(ValueError, match=r"'warmup' trains an index .* one of dense, sparse"):
            hf.set_phase(model, "warmup")
    hf.set_phase(model, "sparse")
    added = {n for n, _ in hf.added_parameters(model)}
    if not added:
        with pytest.raises(ValueError, match="adds no parameters to a model"):
            hf.freeze_backbone(model)
    else:
        hf.freeze_backbone(model)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == added
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n in added)
    hf.freeze_backbone(model, frozen=False)
    assert all(p.requires_grad for p in model.parameters())
