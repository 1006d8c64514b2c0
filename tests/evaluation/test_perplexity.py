"""Loss by position is the model's own loss, cut into buckets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from openmsa.evaluation.perplexity import (
    compare,
    even_edges,
    log_edges,
    position_loss,
    ratio_and_error,
    token_losses,
)

VOCABULARY = 61


def tiny_qwen3(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config)


def tokens(n: int, t: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n, t), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [2, 17, 50])
def test_mean_loss_is_the_models_own_loss(t):
    model, ids = tiny_qwen3(), tokens(3, t)
    own = model(input_ids=ids, labels=ids).loss.detach()
    ours = position_loss(model, ids)
    assert ours.mean_loss == pytest.approx(float(own), rel=1e-5)
    assert sum(ours.num_tokens) == 3 * (t - 1)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_of_logits_change_nothing(chunk):
    model, ids = tiny_qwen3(), tokens(2, 23)
    logits = model(input_ids=ids).logits
    whole = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(token_losses(model, ids, chunk_tokens=chunk), whole)


def test_logits_never_exist_for_all_tokens_at_once():
    model, ids = tiny_qwen3(), tokens(2, 40)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    token_losses(model, ids, chunk_tokens=5)
    assert max(seen) == 5


def test_a_head_that_is_more_than_a_linear_map_is_respected():
    class Capped(Qwen3ForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 2 * torch.tanh(out.logits / 2)
            return out

    plain, ids = tiny_qwen3(), tokens(2, 19)
    capped = Capped(plain.config)
    capped.load_state_dict(plain.state_dict())
    logits = capped(input_ids=ids).logits
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(token_losses(capped, ids), truth)
    assert not torch.allclose(token_losses(plain, ids), truth, atol=1e-2)


def test_a_model_of_another_family_works():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model, ids = GPT2LMHeadModel(config), tokens(2, 30)
    model.eval()
    own = float(model(input_ids=ids, labels=ids).loss.detach())
    assert position_loss(model, ids).mean_loss == pytest.approx(own, rel=1e-5)


def test_buckets_hold_the_losses_of_their_positions():
    model, ids = tiny_qwen3(), tokens(3, 20)
    losses = token_losses(model, ids)
    ours = position_loss(model, ids, edges=(1, 4, 20))
    assert ours.num_tokens == (9, 48)
    assert ours.loss[0] == pytest.approx(float(losses[:, :3].mean()), rel=1e-5)
    assert ours.loss[1] == pytest.approx(float(losses[:, 3:].mean()), rel=1e-5)
    expected = losses[:, 3:].mean(1).std() / math.sqrt(3)
    assert ours.loss_stderr[1] == pytest.approx(float(expected), rel=1e-4)
    assert ours.perplexity[1] == pytest.approx(math.exp(ours.loss[1]))


def test_sequences_of_different_length_keep_their_order_and_their_own_positions():
    model = tiny_qwen3()
    rows = [tokens(1, t, seed=t)[0] for t in (9, 30, 9, 4)]
    together = position_loss(model, rows, edges=(1, 8, 30), batch_size=2)
    alone = [position_loss(model, [row], edges=(1, 8, 30)) for row in rows]
    for mine, single in zip(together.loss_sums, alone, strict=True):
        assert mine == pytest.approx(single.loss_sums[0], rel=1e-5)
    assert together.token_counts == ((7, 1), (7, 22), (7, 1), (3, 0))


def test_comparison_is_paired_so_hard_texts_do_not_widen_the_error():
    base, other = tiny_qwen3(), tiny_qwen3()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    ids = tokens(6, 40)
    a, b = position_loss(base, ids), position_loss(other, ids)
    change = compare(a, b)
    assert change.mean_difference == pytest.approx(b.mean_loss - a.mean_loss, rel=1e-6)
    assert change.mean_stderr < 0.2 * a.mean_loss_stderr
    expected = b.mean_perplexity / a.mean_perplexity - 1
    assert change.perplexity_change == pytest.approx(expected)
    assert compare(a, a).mean_difference == 0 == compare(a, a).mean_stderr


def test_comparing_different_tokens_is_refused():
    model = tiny_qwen3()
    a, b = position_loss(model, tokens(2, 12, seed=1)), position_loss(model, tokens(2, 12, seed=2))
    with pytest.raises(ValueError, match="same tokens"):
        compare(a, b)


def test_the_training_flag_and_the_gradients_are_left_alone():
    model = tiny_qwen3().train()
    position_loss(model, tokens(1, 8))
    assert model.training and all(p.grad is None for p in model.parameters())


def test_progress_reaches_the_end():
    steps = []
    position_loss(tiny_qwen3(), tokens(5, 8), batch_size=2, progress=lambda *at: steps.append(at))
    assert steps == [(2, 5), (4, 5), (5, 5)]


@given(st.integers(2, 3000), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_edges_cover_every_predicted_position_once(num_tokens, step):
    for edges in (log_edges(num_tokens, first=step), even_edges(num_tokens, width=step)):
        assert edges[0] == 1 and edges[-1] == num_tokens
        assert list(edges) == sorted(set(edges))


def test_one_sequence_has_a_mean_and_no_error():
    assert ratio_and_error([6.0], [3]) == (2.0, None)
    assert ratio_and_error([0.0, 0.0], [0, 0]) == (None, None)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "sequences is empty"),
        ([torch.tensor([3])], "at least 2 tokens"),
        ([torch.tensor([1, VOCABULARY])], "outside 0 .. 60"),
        ([torch.tensor([-1, 2])], "outside 0 .. 60"),
        ([torch.zeros(129)], "the model allows 128"),
    ],
)
def test_unusable_sequences_are_named(sequences, message):
    with pytest.raises(ValueError, match=message):
        position_loss(tiny_qwen3(), sequences)


@pytest.mark.parametrize("edges", [(1,), (0, 5), (5, 3), (1, 4, 4)])
def test_edges_must_ascend(edges):
    with pytest.raises(ValueError, match="ascending"):
        position_loss(tiny_qwen3(), tokens(1, 8), edges=edges)
