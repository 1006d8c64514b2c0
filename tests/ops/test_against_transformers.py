"""The definition against a program that nobody here wrote: transformers' MiniMax-M3."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from openmsa import Selection, select_blocks, sparse_attention
from tests.support import every_backend, qkv, seeded

m3 = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
m3_config = pytest.importorskip("transformers.models.minimax_m3_vl.configuration_minimax_m3_vl")

HIDDEN, HEADS, GROUPS, DIM, BLOCK = 24, 8, 2, 8, 4


def indexer(top_k: int, local_blocks: int):
    torch.manual_seed(0)
    config = m3_config.MiniMaxM3VLTextConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=DIM,
        index_n_heads=GROUPS,
        index_head_dim=DIM,
        index_block_size=BLOCK,
        index_topk_blocks=top_k,
        index_local_blocks=local_blocks,
    )
    return m3.MiniMaxM3VLIndexer(config, layer_idx=0)


def their_choice(module, hidden):
    """Their block numbers, and the index query and key that they were made from (no rotation)."""
    b, s, _ = hidden.shape
    cos, sin = torch.ones(b, s, DIM), torch.zeros(b, s, DIM)
    positions = torch.arange(s).expand(b, s)
    with torch.no_grad():
        blocks = module(hidden, (cos, sin), None, positions)
        q_index = module.q_norm(module.q_proj(hidden).view(b, s, GROUPS, DIM))
        k_index = module.k_norm(module.k_proj(hidden))
    return blocks, q_index, k_index


@every_backend
@pytest.mark.parametrize(
    ("tokens", "top_k", "local_blocks"), [(50, 4, 1), (61, 5, 2), (7, 4, 1), (48, 12, 1)]
)
def test_selects_the_blocks_that_m3_selects(backend, tokens, top_k, local_blocks):
    module = indexer(top_k, local_blocks)
    theirs, q_index, k_index = their_choice(module, seeded(2, tokens, HIDDEN))
    ours = select_blocks(
        q_index,
        k_index,
        block_size=BLOCK,
        top_k=top_k,
        local_blocks=local_blocks,
        index_scale=1.0,
        backend=backend,
    ).blocks
    last = ours.new_full((), 10**6)
    theirs = theirs.to(torch.int32)
    theirs = torch.where(theirs < 0, last, theirs).sort(-1).values
    theirs = torch.where(theirs == last, -1, theirs)
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)
    assert (ours[..., theirs.shape[-1] :] == -1).all()


@every_backend
def test_attends_as_m3_attends_with_gradients(backend):
    module = indexer(3, 1)
    blocks, _, _ = their_choice(module, seeded(2, 50, HIDDEN))
    q, k, v = qkv(2, 50, 50, HEADS, GROUPS, DIM, grad=True)
    mask = module.build_block_mask(
        blocks, None, 50, torch.float32, torch.device("cpu"), torch.arange(50).expand(2, 50)
    )
    layer = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, training=False)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    theirs, _ = m3.eager_attention_forward(layer, *heads_first, mask, scaling=DIM**-0.5)
    ours = sparse_attention(q, k, v, Selection(blocks.to(torch.int32), BLOCK), backend=backend)
    torch.testing.assert_close(ours, theirs)
    dout = seeded(2, 50, HEADS, DIM, seed=4)
    gradients = (torch.autograd.grad(x, (q, k, v), dout) for x in (ours, theirs))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
