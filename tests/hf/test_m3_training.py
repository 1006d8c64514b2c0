"""The index of an enabled MiniMax-M3 learns, and no trainer has to know."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import openmsa
from openmsa import hf
from openmsa.training.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.hf.m3_tiny import tiny_m3
from tests.hf.test_training import checkpointing, gradients, parts
from tests.hf.tiny import tiny_tokens


def trained(phase: str = "sparse", **kwargs):
    model = hf.enable(tiny_m3()).train()
    hf.set_phase(model, phase, **kwargs)
    return model


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_each_loss_reaches_its_own_parameters_only(phase):
    model, ids = trained(phase), tiny_tokens(2, 40)
    index, backbone = parts(model)
    out = model(ids, labels=ids)
    out["index_loss"].sum().backward(retain_graph=True)
    by_index = gradients(model)
    assert all(by_index[name] is None for name in backbone)
    assert all(by_index[name].abs().max() > 0 for name in index)
    out["lm_loss"].backward()
    by_lm = gradients(model)
    assert all(by_lm[name] is None for name in index)
    assert all(by_lm[name].abs().max() > 0 for name in backbone if "experts" not in name)


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_the_index_loss_is_the_definition_on_what_the_layer_attends_with(phase):
    model, ids = trained(phase, index_loss_weight=0.3), tiny_tokens(2, 40)
    with hf.capture_attention(model) as calls:
        out = model(ids, labels=ids)
    for call, loss in zip(calls, out["index_loss"], strict=True):
        assert (call.selection is None) == (phase == "warmup")
        expected = openmsa.index_loss(
            call.q, call.k, call.q_index, call.k_index, call.selection, backend="reference"
        )
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(out.loss, out["lm_loss"] + 0.3 * out["index_loss"].sum())


def test_the_router_loss_stays_in_the_loss():
    ids, theirs = tiny_tokens(2, 40), tiny_m3().train()
    expected = theirs(ids, labels=ids, output_router_logits=True)
    out = trained()(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(out["lm_loss"], expected.loss)
    torch.testing.assert_close(out["aux_loss"], expected.aux_loss)


def test_accumulated_micro_batches_are_the_full_batch():
    model, ids = trained(), tiny_tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :13], mask[2, 30:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    full = model(ids, attention_mask=mask, labels=labels)
    full.loss.backward()
    expected = gradients(model)
    total = {
        "num_items_in_batch": (labels[:, 1:] != -100).sum(),
        "index_rows_in_batch": int(mask.sum()),
    }
    loss = 0.0
    for part in (slice(0, 2), slice(2, 3)):
        out = model(ids[part], attention_mask=mask[part], labels=labels[part], **total)
        out.loss.backward()
        loss = loss + out.loss.detach()
    torch.testing.assert_close(loss, full.loss.detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_layers_count_once(frozen):
    model, ids = trained(), tiny_tokens(2, 40)
    hf.freeze_backbone(model, frozen)
    plain = model(ids, labels=ids)
    plain.loss.backward()
    expected = gradients(model)
    checkpointing(model, reentrant=False)
    with hf.capture_attention(model) as calls:
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
    assert len(calls) > 2  # the layers did run again
    assert torch.equal(out.loss, plain.loss)
    for name, gradient in gradients(model).items():
        assert (gradient is None) == (expected[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name])
    checkpointing(model, reentrant=True)
    with pytest.raises(ValueError, match='"use_reentrant": False'):
        model(ids, labels=ids)


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_autocast_computes_the_same_within_its_precision(phase):
    model, ids = trained(phase), tiny_tokens(2, 40)
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16), hf.capture_attention(model) as calls:
        out = model(ids, labels=ids)
    assert calls[0].q.dtype == calls[0].k_index.dtype == torch.bfloat16
    out.loss.backward()
    torch.testing.assert_close(out["lm_loss"], exact["lm_loss"], atol=0.1, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for _, p in hf.index_parameters(model))


def test_a_frozen_backbone_trains_the_index_alone():
    model, ids = trained("warmup"), tiny_tokens(2, 40)
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


def index_gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in hf.index_parameters(model) if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("recomputed", ["", "reentrant", "not reentrant"])
@pytest.mark.parametrize("read", ["logits", "hidden states"])
def test_a_loss_that_somebody_else_makes_trains_the_index(read, recomputed):
    """Once, and with the gradient that the index loss has in our own loss."""
    model, ids = trained(index_loss_weight=0.3), tiny_tokens(2, 40)
    own = model(ids, labels=ids, use_cache=False)
    own.loss.backward()
    expected = index_gradients(model)
    if recomputed:
        if read == "logits" and recomputed == "reentrant":
            pytest.skip("refused: the index loss of the output would be lost")
        checkpointing(model, reentrant=recomputed == "reentrant")
    if read == "logits":
        out = model(ids, use_cache=False)
        made, told = out.logits, out["index_loss"]
        assert not told.requires_grad
    else:
        embedded = model.get_input_embeddings()(ids)
        made = model.lm_head(model.model(inputs_embeds=embedded, use_cache=False)[0])
        told = hf.last_index_loss(model)
    torch.nn.functional.cross_entropy(made[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.testing.assert_close(told, own["index_loss"].detach())
    torch.testing.assert_close(hf.last_index_loss(model), told)
    found = index_gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_nothing_is_attached_where_nothing_learns():
    model, ids = trained(), tiny_tokens(1, 30)
    expected = model.eval().model(ids)[0]
    with torch.no_grad():
        assert torch.equal(model.train().model(ids)[0], expected)
    assert hf.last_index_loss(model) is None
    hf.set_phase(model, "dense")
    model.model(ids)[0].sum().backward()
    assert not index_gradients(model)
    with pytest.raises(ValueError, match="call openmsa.hf.enable on it first"):
        hf.last_index_loss(tiny_m3())


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_the_index(tmp_path, packing):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = hf.enable(tiny_m3(vocab_size=VOCAB_SIZE))
    hf.set_phase(model, "sparse", index_loss_weight=1 / 2)  # two micro-batches a step
    rows = datasets.Dataset.from_list(
        [{"text": "count with me: " + "one two " * n} for n in range(8)]
    )
    config = trl.SFTConfig(**_arguments(tmp_path), packing=packing, max_length=64, bf16=False)
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=byte_tokenizer()
    )
    before = {n: p.detach().clone() for n, p in hf.index_parameters(model)}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in hf.index_parameters(model))
    assert hf.last_index_loss(model).shape == (2,) and (hf.last_index_loss(model) > 0).all()


class _Logged(Trainer):
    """A trainer that reads the output's index_loss, and changes nothing."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, out = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.seen = out["index_loss"].detach()
        return (loss, out) if return_outputs else loss


def _arguments(folder) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_the_index(tmp_path, bf16):
    model = hf.enable(tiny_m3())
    rows = [{"input_ids": row, "labels": row} for row in tiny_tokens(12, 40)]
    before = {n: p.detach().clone() for n, p in hf.index_parameters(model)}
    trainer = _Logged(
        model=model, args=TrainingArguments(**_arguments(tmp_path), bf16=bf16), train_dataset=rows
    )
    trainer.train()
    assert trainer.seen.shape == (2,) and (trainer.seen > 0).all()
    for name, parameter in hf.index_parameters(model):
        assert not torch.equal(parameter, before[name])


def adapted(model, targets: list[str]):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("late", [False, True], ids=["enabled first", "adapted first"])
def test_adapters_on_main_and_index_projections_learn(late):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if late:
        model = hf.enable(adapted(tiny_m3(), targets))
    else:
        model = adapted(hf.enable(tiny_m3()), targets)
    ids = tiny_tokens(2, 40)
    out = model.train()(input_ids=ids, labels=ids)
    out.loss.backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(".indexer." in name and "lora_" in name for name in learned) == 8
    merged = model.merge_and_unload()
    assert hf.msa_layers(merged) == [1, 2]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids, labels=ids)["index_loss"], out["index_loss"])


def test_adapters_on_the_index_alone_warm_it_up():
    model = adapted(hf.enable(tiny_m3()), ["indexer.q_proj", "indexer.k_proj"]).train()
    hf.set_phase(model, "warmup", index_loss_weight=2.0)
    assert hf.is_msa(model) and hf.msa_layers(model) == [1, 2]
    with pytest.raises(ValueError, match="put them on the index alone"):
        hf.freeze_backbone(model)
    ids, losses = tiny_tokens(2, 40), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(5):
        out = model(input_ids=ids, labels=ids)
        losses.append(out["index_loss"].sum().item())
        torch.testing.assert_close(out.loss.item(), out["lm_loss"].item() + 2 * losses[-1])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
