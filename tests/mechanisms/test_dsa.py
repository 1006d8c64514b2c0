"""DSA as a whole: phases, where gradients go, its config, MLA, and two other codes of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from openmsa import dense_attention, sparse_attention
from openmsa.mechanisms.dsa import DSAConfig, dsa_attention
from openmsa.ops.token_selection import select_tokens, token_index_loss
from tests.support import eager_attention, qkv, readable, seeded

CONFIG = DSAConfig(top_k=6, index_heads=3, d_index=5)

both_codes = pytest.mark.parametrize("backend", ["reference", "portable"])


def tensors(b=2, t=30, s=30, h=4, g=2, d=8, dv=None, *, dtype=torch.float64, grad=True):
    """q, k, v, q_index, k_index, head_weights"""
    index = ((b, t, 3, 5), (b, s, 5), (b, t, 3))
    return (
        *qkv(b, t, s, h, g, d, dv, dtype=dtype, grad=grad),
        *(seeded(*x, seed=20 + i, dtype=dtype, grad=grad) for i, x in enumerate(index)),
    )


@both_codes
def test_sparse_phase_is_select_attend_and_loss(backend):
    q, k, v, *index = tensors()
    made = dsa_attention(q, k, v, *index, CONFIG, scale=0.5, backend=backend)
    selection = select_tokens(*index, top_k=6)
    out, lse = sparse_attention(q, k, v, selection, scale=0.5, return_lse=True)
    assert torch.equal(made.selection.blocks, selection.blocks)
    torch.testing.assert_close(made.out, out)
    torch.testing.assert_close(made.lse, lse)
    torch.testing.assert_close(
        made.index_loss, token_index_loss(q, k, *index, selection, scale=0.5)
    )


@both_codes
def test_the_other_phases_attend_densely(backend):
    q, k, v, *index = tensors()
    for phase in ("dense", "warmup"):
        made = dsa_attention(q, k, v, *index, CONFIG, phase=phase, backend=backend)
        torch.testing.assert_close(made.out, dense_attention(q, k, v))
        assert made.selection is None
        assert (made.index_loss is None) == (phase == "dense")
    torch.testing.assert_close(made.index_loss, token_index_loss(q, k, *index))
    made = dsa_attention(q, k, v, *index, CONFIG, with_index_loss=False, backend=backend)
    assert made.index_loss is None


@both_codes
@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_loss_and_output_keep_their_gradients_apart(backend, phase):
    inputs = tensors()
    made = dsa_attention(*inputs, CONFIG, phase=phase, backend=backend)
    from_out = torch.autograd.grad(made.out.sum(), inputs, allow_unused=True, retain_graph=True)
    from_loss = torch.autograd.grad(made.index_loss, inputs, allow_unused=True)
    assert [x is not None for x in from_out] == [True] * 3 + [False] * 3
    assert [x is not None for x in from_loss] == [False] * 3 + [True] * 3


@both_codes
def test_keeping_every_token_equals_the_dense_phase(backend):
    inputs = tensors()
    all_kept = dataclasses.replace(CONFIG, top_k=30)
    kept = dsa_attention(*inputs, all_kept, backend=backend)
    dense = dsa_attention(*inputs, CONFIG, phase="warmup", backend=backend)
    torch.testing.assert_close(kept.out, dense.out)
    torch.testing.assert_close(kept.index_loss, dense.index_loss)
    few = dsa_attention(*inputs, CONFIG, backend=backend)
    assert (few.out - dense.out)[:, 6:].abs().amax((0, 2, 3)).min() > 1e-4


@both_codes
def test_decoding_equals_the_full_pass(backend):
    q, k, v, q_index, k_index, head_weights = tensors()
    full = dsa_attention(q, k, v, q_index, k_index, head_weights, CONFIG, backend=backend)
    for start, end in ((0, 1), (6, 7), (13, 20), (29, 30)):
        here = slice(start, end)
        step = dsa_attention(
            *(q[:, here], k[:, :end], v[:, :end]),
            *(q_index[:, here], k_index[:, :end], head_weights[:, here]),
            CONFIG,
            backend=backend,
        )
        torch.testing.assert_close(step.out, full.out[:, here])


@both_codes
def test_mla_is_one_kv_head(backend):
    """Absorbed: k is the latent and the rotary part, v the latent, and the scale that of MLA."""
    latent, rotary, h, nope, dv = 12, 4, 5, 6, 7
    q_nope, q_rotary = (seeded(2, 20, h, x, seed=i) for i, x in enumerate((nope, rotary)))
    c, k_rotary = (seeded(2, 20, x, seed=3 + i) for i, x in enumerate((latent, rotary)))
    up_k, up_v = (seeded(h, x, latent, seed=6 + i) for i, x in enumerate((nope, dv)))
    index = [x.float().detach() for x in tensors(2, 20, 20)[3:]]
    scale = (nope + rotary) ** -0.5

    q = torch.cat([torch.einsum("bthn,hnl->bthl", q_nope, up_k), q_rotary], -1)
    k = torch.cat([c, k_rotary], -1)[:, :, None]
    made = dsa_attention(q, k, c[:, :, None], *index, CONFIG, scale=scale, backend=backend)
    ours = torch.einsum("bthl,hvl->bthv", made.out, up_v)

    keys = torch.einsum("bsl,hnl->bshn", c, up_k)
    keys = torch.cat([keys, k_rotary[:, :, None].expand(-1, -1, h, -1)], -1)
    values = torch.einsum("bsl,hvl->bshv", c, up_v)
    read = readable(20, 20, made.selection.blocks, 1)
    expanded = torch.cat([q_nope, q_rotary], -1)
    truth = eager_attention(*(x.double() for x in (expanded, keys, values)), read, scale)
    torch.testing.assert_close(ours.double(), truth, atol=1e-5, rtol=1e-5)
    loss = token_index_loss(expanded, keys, *index, made.selection, scale=scale, backend=backend)
    torch.testing.assert_close(made.index_loss, loss, atol=1e-5, rtol=1e-5)


def test_transformers_deepseek_v32_is_computed_by_it():
    """Its own indexer and attention on a tiny random model, against the room in MQA form."""
    v32 = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

    torch.manual_seed(0)
    config = DeepseekV32Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=10,
        kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=7, index_topk=5,
        index_head_dim=8, index_n_heads=16, num_hidden_layers=1, attn_implementation="eager",
    )  # fmt: skip
    layer = v32.DeepseekV32Attention(config, 0).double()
    for weights in layer.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    x = torch.randn(2, 23, 24, dtype=torch.float64)
    cos, sin = v32.DeepseekV32RotaryEmbedding(config)(x, torch.arange(23)[None])
    mask = torch.ones(23, 23, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    mask = torch.zeros(2, 1, 23, 23, dtype=torch.float64).masked_fill(~mask, -math.inf)
    theirs, weights = layer(x, (cos, sin), mask)

    made = _room_of(layer, config, v32, x, cos, sin)
    values = layer.kv_b_proj.weight.view(4, 13, 12)[:, 6:]
    heads = torch.einsum("bthl,hvl->bthv", made.out, values).flatten(2)
    torch.testing.assert_close(layer.o_proj(heads), theirs, atol=1e-6, rtol=1e-5)
    read = readable(23, 23, made.selection.blocks, 1)
    assert torch.equal(read.expand(-1, 4, -1, -1), weights > 0)


def _room_of(layer, config, v32, x, cos, sin):
    """What the layer projects, given to the room."""
    b, t, _ = x.shape
    resid = layer.q_a_layernorm(layer.q_a_proj(x))
    q_nope, q_rotary = layer.q_b_proj(resid).view(b, t, 4, 10).split([6, 4], -1)
    latent, k_rotary = layer.kv_a_proj_with_mqa(x).split([12, 4], -1)
    latent, k_rotary = layer.kv_a_layernorm(latent), k_rotary[:, :, None]
    turned = v32.apply_rotary_pos_emb_interleave(q_rotary, k_rotary, cos, sin, unsqueeze_dim=2)
    up = layer.kv_b_proj.weight.view(4, 13, 12)[:, :6]
    q = torch.cat([torch.einsum("bthn,hnl->bthl", q_nope, up), turned[0]], -1)
    k = torch.cat([latent[:, :, None], turned[1]], -1)

    indexer = layer.indexer
    q_index = indexer.wq_b(resid).view(b, t, 16, 8)
    k_index = indexer.k_norm(indexer.wk(x))[:, :, None]
    front = v32.apply_rotary_pos_emb(q_index[..., :4], k_index[..., :4], cos, sin, unsqueeze_dim=2)
    q_index = torch.cat([front[0], q_index[..., 4:]], -1)
    k_index = torch.cat([front[1], k_index[..., 4:]], -1)[:, :, 0]
    index = q_index, k_index, indexer.weights_proj(x)
    ours = DSAConfig(top_k=config.index_topk, index_heads=16, d_index=8)
    return dsa_attention(q, k, latent[:, :, None], *index, ours, scale=layer.scaling)


@pytest.mark.parametrize("g", [1, 2])
def test_flash_linear_attention_agrees(g):
    """Its choice is worth the same (equal scores it takes in any order); so is its attention."""
    naive = pytest.importorskip("fla.ops.dsa.naive")
    q, k, v, *index = (x.float().detach() for x in tensors(g=g))
    made = dsa_attention(q, k, v, *index, CONFIG)
    ours = made.selection.blocks[:, 0].long()
    theirs = naive.naive_dsa_indexer(*index, topk=6, activation="relu")
    heads = torch.einsum("bthi,bsi->bths", *index[:2]).relu()
    scores = (heads * index[2][..., None]).sum(2)
    worth = [
        scores.gather(-1, x.clamp(min=0)).masked_fill(x < 0, math.inf).sort(-1).values
        for x in (ours, theirs)
    ]
    torch.testing.assert_close(*worth)
    out = naive.naive_dsa(q, k, v, None, None, indices=ours)
    torch.testing.assert_close(made.out, out)


def test_config_is_deepseeks_by_default_and_refuses_nonsense():
    config = DSAConfig()
    assert (config.top_k, config.index_heads, config.d_index) == (2048, 64, 128)
    assert DSAConfig(layers=[3, 1]).layers == (1, 3)
    assert DSAConfig(**dataclasses.asdict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 8
    for fields, message in (
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"index_heads": 1.5}, "index_heads must be"),
        ({"d_index": True}, "d_index must be"),
        ({"layers": (1, 1)}, "name each layer once"),
        ({"layers": 3}, "layers must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            DSAConfig(**fields)
    with pytest.raises(ValueError, match="phase must be one of dense, warmup, sparse"):
        dsa_attention(*tensors(), CONFIG, phase="open")
