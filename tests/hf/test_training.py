"""Losses and gradients go where they should, whole and once."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.utils import ModelOutput

import openmsa
from openmsa import hf
from tests.hf.tiny import FAMILIES, SPARSE, tiny_model, tiny_tokens


def trained(family: str = "qwen3", phase: str = "sparse", config=SPARSE, **kwargs):
    model = hf.convert(tiny_model(family), config, init="random").train()
    hf.set_phase(model, phase, **kwargs)
    return model


def gradients(model) -> dict[str, torch.Tensor | None]:
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def parts(model) -> tuple[list[str], list[str]]:
    index = [name for name, _ in hf.index_parameters(model)]
    return index, [name for name, _ in model.named_parameters() if name not in index]


def checkpointing(model, reentrant: bool) -> None:
    how = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_each_loss_reaches_its_own_parameters_only(family, phase):
    model, ids = trained(family, phase), tiny_tokens(2, 40)
    index, backbone = parts(model)
    out = model(ids, labels=ids)
    out["index_loss"].sum().backward(retain_graph=True)
    by_index = gradients(model)
    assert all(by_index[name] is None for name in backbone)
    assert all(by_index[name].abs().max() > 0 for name in index)
    out["lm_loss"].backward()
    by_lm = gradients(model)
    assert all(by_lm[name] is None for name in index)
    assert all(by_lm[name].abs().max() > 0 for name in backbone)


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_the_index_loss_is_the_definition_on_what_the_layer_attends_with(phase):
    model, ids = trained(phase=phase, index_loss_weight=0.3), tiny_tokens(2, 40)
    with hf.capture_attention(model) as calls:
        out = model(ids, labels=ids)
    for call, loss in zip(calls, out["index_loss"], strict=True):
        assert (call.selection is None) == (phase == "warmup")
        expected = openmsa.index_loss(
            call.q, call.k, call.q_index, call.k_index, call.selection, backend="reference"
        )
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(out.loss, out["lm_loss"] + 0.3 * out["index_loss"].sum())
    assert out.index_loss is out["index_loss"]


def test_the_dense_phase_is_the_dense_model_in_training():
    dense, ids = tiny_model().train(), tiny_tokens(2, 40)
    expected = dense(ids, labels=ids)
    expected.loss.backward()
    model = trained(phase="dense")
    out = model(ids, labels=ids)
    assert "index_loss" not in out
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    index, _ = parts(model)
    found = gradients(model)
    assert all(found[name] is None for name in index)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-5, rtol=1e-3)


def test_evaluation_gives_the_language_model_loss_alone():
    model, ids = trained().eval(), tiny_tokens(2, 40)
    out = model(ids, labels=ids)
    assert "index_loss" not in out
    torch.testing.assert_close(out.loss, model.train()(ids, labels=ids)["lm_loss"])


def test_without_labels_the_index_loss_comes_all_the_same():
    out = trained()(tiny_tokens(2, 40))
    assert out.loss is None
    assert out["index_loss"].shape == (3,)


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
@pytest.mark.parametrize("known", ["rows", "labels"])
def test_accumulated_micro_batches_are_the_full_batch(phase, known):
    """Two micro-batches of 2 and 1 padded rows.

    By labels it comes to the same where every row has as many labels as the others.
    """
    model = trained(phase=phase)
    ids = tiny_tokens(3, 40)
    mask = torch.ones_like(ids)
    if known == "rows":
        mask[0, :13], mask[2, 30:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    full = model(ids, attention_mask=mask, labels=labels)
    full.loss.backward()
    expected = gradients(model)

    total = {"num_items_in_batch": (labels[:, 1:] != -100).sum()}
    if known == "rows":
        total["index_rows_in_batch"] = int(mask.sum())
    loss = 0.0
    for part in (slice(0, 2), slice(2, 3)):
        out = model(ids[part], attention_mask=mask[part], labels=labels[part], **total)
        out.loss.backward()
        loss = loss + out.loss.detach()
    torch.testing.assert_close(loss, full.loss.detach())
    found = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_layers_count_once(phase, frozen):
    model, ids = trained(phase=phase), tiny_tokens(2, 40)
    hf.freeze_backbone(model, frozen)
    plain = model(ids, labels=ids)
    plain.loss.backward()
    expected = gradients(model)
    checkpointing(model, reentrant=False)
    with hf.capture_attention(model) as calls:
        out = model(ids, labels=ids, use_cache=False)
        assert len(calls) == 3
        out.loss.backward()
        assert len(calls) > 3  # the layers did run again
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(out["index_loss"], plain["index_loss"])
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient)


def test_reentrant_checkpointing_is_refused():
    model, ids = trained(), tiny_tokens(2, 40)
    checkpointing(model, reentrant=True)
    with pytest.raises(ValueError, match='"use_reentrant": False'):
        model(ids, labels=ids)
    hf.set_phase(model, "dense")
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_autocast_computes_the_same_within_its_precision(family, phase):
    model, ids = trained(family, phase), tiny_tokens(2, 40)
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16), hf.capture_attention(model) as calls:
        out = model(ids, labels=ids)
    assert calls[0].q.dtype == calls[0].k_index.dtype == torch.bfloat16
    out.loss.backward()
    torch.testing.assert_close(out["lm_loss"], exact["lm_loss"], atol=0.05, rtol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_frozen_backbone_trains_the_index_alone():
    model, ids = trained(phase="warmup"), tiny_tokens(2, 40)
    index, backbone = parts(model)
    hf.freeze_backbone(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == index
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        out = model(ids, labels=ids)
        losses.append(out["index_loss"].sum().item())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in backbone)
    assert not any(torch.equal(after[name], before[name]) for name in index)
    hf.freeze_backbone(model, frozen=False)
    assert all(p.requires_grad for p in model.parameters())


def test_outputs_survive_what_trainers_do_to_them():
    """Tuples, rebuilding from a dict (accelerate) and flattening (torch's data parallel)."""
    model, ids = trained(), tiny_tokens(1, 20)
    out = model(ids, labels=ids, use_cache=False)
    assert isinstance(out, ModelOutput)
    as_tuple = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], out.loss)
    rebuilt = type(out)(dict(out))
    assert torch.equal(rebuilt["index_loss"], out["index_loss"])
    leaves, tree = torch.utils._pytree.tree_flatten(out)
    assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, tree).index_loss, out.index_loss)


def test_only_the_chosen_layers_have_an_index_loss():
    model = trained(config=openmsa.MSAConfig(block_size=4, top_k=3, layers=(2, 0)))
    out = model(tiny_tokens(1, 40))
    assert out["index_loss"].shape == (2,)
    assert hf.msa_layers(model) == [0, 2]


def test_attention_dropout_is_refused_in_training_only():
    model, ids = hf.convert(tiny_model(attention_dropout=0.1), SPARSE), tiny_tokens(1, 20)
    model(ids)
    with pytest.raises(ValueError, match=r"attention_dropout=0.1 is not supported"):
        model.train()(ids)


def test_phases_are_checked():
    model = trained()
    with pytest.raises(ValueError, match="phase must be one of dense, warmup, sparse, got 'warm'"):
        hf.set_phase(model, "warm")
    with pytest.raises(ValueError, match="index_loss_weight must be at least 0, got -1"):
        hf.set_phase(model, "sparse", index_loss_weight=-1)
    for function in (hf.msa_config, hf.msa_layers, hf.freeze_backbone, hf.to_dense):
        with pytest.raises(ValueError, match="not converted"):
            function(tiny_model())
    with pytest.raises(ValueError, match="not converted"):
        hf.set_phase(tiny_model(), "sparse")
