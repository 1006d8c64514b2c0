"""NSA against two public implementations, where they are installed; neither is a dependency."""

from __future__ import annotations

import pytest
import torch

from openmsa.mechanisms.nsa import NSAConfig, compress, nsa_attention
from tests.support import qkv, seeded


def mean_compressed(k, v, config):
    zeros = (k.new_zeros(config.kernel, *x.shape[2:]) for x in (k, v))
    return [compress(x, weights, config) for x, weights in zip((k, v), zeros)]


def test_fla_naive():
    """Its windows are its blocks, and it computes in fp32. Its window branch needs a GPU."""
    naive = pytest.importorskip("fla.ops.nsa.naive")
    config = NSAConfig(kernel=8, stride=8, block_size=8, top_k=4, window=1)
    q, k, v = qkv(2, 90, 90, 32, 2, 16, grad=True)
    gates = seeded(2, 90, 32, 3, seed=9).sigmoid() * torch.tensor([1.0, 1, 0])
    compressed = mean_compressed(k, v, config)
    made = nsa_attention(q, k, v, *compressed, gates, config)

    blocks = naive.naive_nsa_topk(q, compressed[0], 4, 8, 0.25)
    # Its last block is none while it is not full; ours may be read up to the query.
    theirs = blocks.transpose(1, 2).sort(-1).values
    whole = slice(0, 88)
    ours = made.selection.blocks.sort(-1).values
    assert torch.equal(ours[:, :, whole], theirs[:, :, whole].int())
    chosen = made.selection.blocks.transpose(1, 2).long()
    selected = naive.naive_nsa_selection(q, k, v, chosen, 8, 0.25)
    coarse, _ = naive.naive_nsa_compression(q, *compressed, 8, 0.25)
    out = gates[..., :1] * coarse + gates[..., 1:2] * selected
    torch.testing.assert_close(made.out, out)
    dout = seeded(*out.shape, seed=3)
    for a, b in zip(
        *(torch.autograd.grad(x, (q, k, v), dout, retain_graph=True) for x in (made.out, out))
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def same_gradients(outputs, inputs, dout, **tolerance):
    ours, theirs = (torch.autograd.grad(x, inputs, dout, retain_graph=True) for x in outputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **tolerance)


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(-2)


def their_layer(peer, h, g, d, block, selected):
    """Its module without positions, memory keys and the projection that mixes heads."""
    sizes = {"compress_block_size": block, "compress_block_sliding_stride": block}
    layer = peer.SparseAttention(
        dim=h * d,
        dim_head=d,
        heads=h,
        kv_heads=g,
        sliding_window_size=9,
        selection_block_size=block,
        num_selected_blocks=selected,
        compress_mlp=Mean(),
        causal=True,
        norm=False,
        **sizes,
    ).double()
    layer.compress_mem_kv = torch.nn.Parameter(torch.zeros(2, g, 0, d, dtype=torch.float64))
    layer.combine_heads = torch.nn.Identity()
    layer.rotary_emb = Unrotated()
    torch.nn.init.normal_(layer.to_strategy_combine[0].weight, std=0.2)
    return layer


class Unrotated(torch.nn.Module):
    def rotate_queries_with_cached_keys(self, q, k):
        return q, k


@pytest.mark.parametrize(("h", "g", "selected"), [(3, 3, 3), (4, 2, 11)])
def test_lucidrains(h, g, selected):
    """Its window holds one token more, it sees a compressed window one token later than we do, and
    its own block comes beside the chosen ones. A group's choice goes by the mean of its heads'
    scores before the softmax, not by the paper's sum after it: so one head a group, or all chosen.
    """
    peer = pytest.importorskip("native_sparse_attention_pytorch.native_sparse_attention")
    d, block = 8, 8
    layer = their_layer(peer, h, g, d, block, selected)
    sizes = {"kernel": block, "stride": block, "block_size": block, "window": 10}
    config = NSAConfig(**sizes, top_k=selected + 1, local_blocks=1, sink_blocks=0)
    hidden = seeded(2, 88, h * d, seed=1, dtype=torch.float64, grad=True)
    theirs = layer(hidden).unflatten(-1, (h, d))

    q, k, v = layer.to_qkv(hidden).split(layer.qkv_split, -1)
    gates = layer.to_strategy_combine(hidden).transpose(1, 2)
    q, k, v = q.unflatten(-1, (h, d)), k.unflatten(-1, (g, d)), v.unflatten(-1, (g, d))
    made = nsa_attention(q, k, v, *mean_compressed(k, v, config), gates, config).out

    place = torch.arange(88)
    same = (place >= block) & ((place + 1) % block != 0)
    torch.testing.assert_close(made[:, same], theirs[:, same])
    dout = seeded(*made.shape, seed=3, dtype=torch.float64) * same[:, None, None]
    learn = (hidden, layer.to_qkv.weight, layer.to_strategy_combine[0].weight)
    same_gradients((made, theirs), learn, dout)
