"""The index derived from the main branch: what it must reproduce, and that it beats the mean."""

from __future__ import annotations

import pytest
import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

import openmsa
from openmsa import hf
from openmsa.hf.derive import _set_gain, pairs_of, shared_key
from tests.hf.tiny import SPARSE, tiny_model, tiny_tokens


def calls_of(model, tokens: int = 40, **inputs) -> list[hf.AttentionCall]:
    with torch.no_grad(), hf.capture_attention(model) as calls:
        model(tiny_tokens(1, tokens), **inputs)
    return calls


def index_scores(call: hf.AttentionCall) -> torch.Tensor:
    return torch.einsum("btgi,bsi->bgts", call.q_index, call.k_index) * call.index_scale


def mean_logits(call: hf.AttentionCall) -> torch.Tensor:
    """Of the heads of a group."""
    q = call.q.unflatten(2, (call.k.shape[2], -1)).mean(3)
    return torch.einsum("btgd,bsgd->bgts", q, call.k) * call.scale


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [1, 4])
def test_with_one_group_the_index_is_the_mean_head(family, heads):
    """Biases (llama, qwen2) included. A norm (qwen3) leaves the direction of every key."""
    model = tiny_model(family, num_attention_heads=heads, num_key_value_heads=1, seed=3)
    for call in calls_of(hf.convert(model, SPARSE)):
        if family != "qwen3":
            torch.testing.assert_close(index_scores(call), mean_logits(call), atol=1e-4, rtol=1e-4)
        elif heads == 1:
            for ours, main in ((call.q_index, call.q), (call.k_index, call.k[:, :, 0])):
                alike = torch.nn.functional.cosine_similarity(ours, main, dim=-1)
                torch.testing.assert_close(alike, torch.ones_like(alike))


def test_groups_whose_keys_differ_by_a_turn_share_one_key_without_loss():
    """Their mean would cancel; the second group's keys are the first's, turned pair by pair."""
    model = tiny_model("llama", attention_bias=False)
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight.data.view(2, 2, 8, 48)
        first = torch.complex(weight[0, 0], weight[0, 1])
        turned = first * torch.polar(torch.linspace(0.3, 2, 8), torch.linspace(0, 6, 8))[:, None]
        weight[1, 0], weight[1, 1] = turned.real, turned.imag
    for call in calls_of(hf.convert(model, SPARSE)):
        torch.testing.assert_close(index_scores(call), mean_logits(call), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_the_shared_key_is_the_best_one(groups):
    """No other combination of the keys comes closer to all of them, weighted by the queries."""
    generator = torch.Generator().manual_seed(groups)
    q, k = (torch.randn(300, 3, groups, dtype=torch.cfloat, generator=generator) for _ in range(2))
    k = k @ torch.randn(groups, groups, dtype=torch.cfloat, generator=generator)
    weight = q.abs().square().mean(0)

    def miss(shared: torch.Tensor) -> torch.Tensor:
        energy = shared.abs().square().sum(0)
        c = torch.einsum("npg,np->pg", k, shared.conj()) / energy[:, None]
        gap = (k - c * shared[..., None]).abs().square().mean(0)
        return (weight * gap).sum(-1)

    a, c, importance = shared_key(q, k)
    shared = torch.einsum("npg,pg->np", k, a)
    best = miss(shared)
    total = (weight * k.abs().square().mean(0)).sum(-1)
    torch.testing.assert_close(total - best, importance.float(), atol=1e-3, rtol=1e-3)
    gap = (weight * (k - c * shared[..., None]).abs().square().mean(0)).sum(-1)
    torch.testing.assert_close(gap, best, atol=1e-3, rtol=1e-3)
    for _ in range(20):
        other = torch.randn(3, groups, dtype=torch.cfloat, generator=generator)
        assert (best <= miss(torch.einsum("npg,pg->np", k, other)) + 1e-4).all()
    assert (best <= miss(k.mean(-1)) + 1e-4).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("d_index", [2, 6, 8])
def test_a_narrow_index_turns_as_its_channels_do(family, d_index):
    """Moving every token by 7 positions changes no index score; a wrong pairing of RoPE would."""
    for init in ("main", "random"):
        config = openmsa.MSAConfig(block_size=4, top_k=3, d_index=d_index)
        model = hf.convert(tiny_model(family), config, init=init)
        here, there = (
            calls_of(model, position_ids=torch.arange(at, at + 40)[None])[0] for at in (0, 7)
        )
        assert here.q_index.shape == (1, 40, 2, d_index)
        torch.testing.assert_close(index_scores(here), index_scores(there), atol=1e-4, rtol=1e-4)


def test_a_narrow_index_keeps_the_pairs_that_matter():
    """One head whose logits three pairs carry: a third of the width is enough."""
    model = tiny_model("llama", num_attention_heads=1, num_key_value_heads=1, attention_bias=False)
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight.data.view(2, 8, 48)
        weight[:, [0, 2, 3, 6, 7]] = 0
    hf.convert(model, openmsa.MSAConfig(block_size=4, top_k=3, d_index=6))
    for layer, call in zip(model.model.layers, calls_of(model), strict=True):
        assert layer.self_attn.index_channels.tolist() == [1, 4, 5, 9, 12, 13]
        torch.testing.assert_close(index_scores(call), mean_logits(call), atol=1e-4, rtol=1e-4)


def test_channels_that_turn_together():
    assert pairs_of(halves, 6, 6).T.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert pairs_of(halves, 4, 8).T.tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]
    assert pairs_of(interleaved, 6, 6).T.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_that_add_one_to_their_weight_are_seen_through(offset):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8), requires_grad=False)

        def forward(self, x):
            return x / x.square().mean(-1, keepdim=True).sqrt() * (self.weight + offset)

    norm, x = Norm(), torch.randn(5, 8)
    _set_gain(norm, torch.tensor(2.5))
    torch.testing.assert_close(norm(x).square().mean(-1).sqrt(), torch.full((5,), 2.5))


def test_deriving_leaves_no_trace():
    """Not in the random state, nor in the mode, nor in a hook."""
    model = tiny_model().train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    hf.convert(model, SPARSE)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    other = hf.convert(tiny_model(), SPARSE)
    for (_, ours), (_, again) in zip(
        hf.index_parameters(model), hf.index_parameters(other), strict=True
    ):
        assert torch.equal(ours, again)
        assert ours.requires_grad
