"""The index branch of one attention layer: its modules, and the index they compute.

    q_index[t, g] = rope(norm(W_q_index x[t]))[g]                                   (MSA eqs. 5-6)
    k_index[t]    = rope(norm(W_k_index x[t]))

with the main branch's norm (if it has one per head), its own RoPE, and a bias where it has one.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

MODULES = ("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm")
NORMS = {"index_q_norm": "q_norm", "index_k_norm": "k_norm"}


def head_dim_of(attention: nn.Module) -> int:
    """Channels of one head of the main branch."""
    return attention.head_dim


def num_groups_of(attention: nn.Module) -> int:
    """KV heads: each is a group of query heads with a selection of its own."""
    return attention.k_proj.out_features // head_dim_of(attention)


def add_index_branch(attention: nn.Module, d_index: int, heads: int | None = None) -> None:
    """Give `attention` the modules of an index of width `d_index`, not initialised, beside its own.

    heads: index queries per token, None for one per group.

    An index narrower than the head keeps some of the pairs of channels that RoPE turns together,
    hence their angles: `index_channels` says which, first all firsts, then all seconds. Here they
    are spread evenly over the frequencies.
    """
    q, k, dim = attention.q_proj, attention.k_proj, head_dim_of(attention)
    like = {"device": q.weight.device, "dtype": q.weight.dtype}
    bias_q, bias_k = q.bias is not None, k.bias is not None
    heads = num_groups_of(attention) if heads is None else heads
    for name, size, bias in (("q", heads * d_index, bias_q), ("k", d_index, bias_k)):
        proj = nn.utils.skip_init(nn.Linear, q.in_features, size, bias=bias, **like)
        setattr(attention, f"index_{name}_proj", proj)
    for ours, main in NORMS.items():
        if getattr(attention, main, None) is not None:
            setattr(attention, ours, _norm_like(getattr(attention, main), d_index))
    if d_index < dim:
        half, kept = dim // 2, d_index // 2
        firsts = (torch.arange(1, kept + 1, device=q.weight.device) * half) // kept - 1
        attention.register_buffer("index_channels", torch.cat([firsts, firsts + half]))


def _norm_like(norm: nn.Module, channels: int) -> nn.Module:
    """A norm of the same class over fewer channels."""
    ours = copy.deepcopy(norm)
    for name, weight in list(ours.named_parameters(recurse=False)):
        setattr(ours, name, nn.Parameter(weight.detach()[:channels].clone()))
    return ours


@torch.no_grad()
def start_at_random(attention: nn.Module, initialise) -> None:
    """Start the index as the model starts its own modules; `initialise` is its _init_weights."""
    for name in MODULES:
        if hasattr(attention, name):
            initialise(getattr(attention, name))


def index_of(
    attention: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], d_index: int
) -> tuple[Tensor, Tensor]:
    """q_index [b, t, heads, d_index] and k_index [b, t, d_index] of hidden [b, t, channels]."""
    q = attention.index_q_proj(hidden).unflatten(-1, (-1, d_index))
    k = attention.index_k_proj(hidden).unflatten(-1, (1, d_index))
    if hasattr(attention, "index_q_norm"):
        q = attention.index_q_norm(q)
    if hasattr(attention, "index_k_norm"):
        k = attention.index_k_norm(k)
    q, k = rotated(attention, q, k, position_embeddings, d_index)
    return q, k.squeeze(2)


def rotated(attention, q: Tensor, k: Tensor, position_embeddings, d_index: int):
    """RoPE by the main branch's own function: q [b, t, g, d_index], k [b, t, 1, d_index]."""
    cos, sin = position_embeddings
    if d_index < head_dim_of(attention):
        channels = attention.index_channels
        cos, sin = cos[..., channels], sin[..., channels]
    turned = cos.shape[-1]  # fewer than d_index where RoPE turns a part of the head only
    pair = [x[..., :turned].transpose(1, 2) for x in (q, k)]
    pair = [x.transpose(1, 2) for x in attention.rotate(*pair, cos, sin)]
    if turned < d_index:
        pair = [torch.cat([x, rest[..., turned:]], -1) for x, rest in zip(pair, (q, k))]
    return pair
