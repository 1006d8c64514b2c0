"""The index branch of one attention layer: its projections, where they start from, and the index
they compute.

    q_index[t, g] = rope(norm(W_q_index x[t]))[g]      k_index[t] = rope(norm(W_k_index x[t]))
    (MSA eqs. 5-6)

with the main branch's kind of norm (one per head, if it has one), its own RoPE and a bias where it
has one.
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


def kept_channels(head_dim: int, d_index: int) -> Tensor:
    """Which channels of a head a narrower index keeps, int64 [d_index].

    RoPE turns channels i and i + head_dim / 2 by one angle, so a pair stays or goes as one. The
    pairs kept are spread evenly over the frequencies and always hold the slowest, which tells far
    blocks apart.
    """
    pairs, kept = head_dim // 2, d_index // 2
    chosen = (torch.arange(1, kept + 1) * pairs) // kept - 1
    return torch.cat([chosen, chosen + pairs])


def add_index_branch(attention: nn.Module, d_index: int) -> None:
    """Give `attention` the modules of an index of width `d_index`, not initialised, beside
    its own.
    """
    q, k = attention.q_proj, attention.k_proj
    like = {"device": q.weight.device, "dtype": q.weight.dtype}
    groups = num_groups_of(attention)
    bias = q.bias is not None
    attention.index_q_proj = nn.Linear(q.in_features, groups * d_index, bias=bias, **like)
    bias = k.bias is not None
    attention.index_k_proj = nn.Linear(k.in_features, d_index, bias=bias, **like)
    channels = kept_channels(head_dim_of(attention), d_index)
    for ours, main in NORMS.items():
        if getattr(attention, main, None) is not None:
            setattr(attention, ours, _norm_like(getattr(attention, main), channels))


def _norm_like(norm: nn.Module, channels: Tensor) -> nn.Module:
    """A norm of the same class over fewer channels."""
    ours = copy.deepcopy(norm)
    for name, weight in list(ours.named_parameters(recurse=False)):
        setattr(ours, name, nn.Parameter(weight.detach()[channels.to(weight.device)].clone()))
    return ours


def remove_index_branch(attention: nn.Module) -> None:
    """Take the modules away again."""
    for name in MODULES:
        if hasattr(attention, name):
            delattr(attention, name)


@torch.no_grad()
def derive_from_main(attention: nn.Module, d_index: int) -> None:
    """Start the index from the main branch: query = mean of the group's heads, key = mean of the KV
    heads.

    A narrower index keeps the channels of `kept_channels`; norms are shared by all heads and taken
    over. Without a norm the query carries the factor that makes q_index . k_index / sqrt(d_index) a
    logit on the main branch's scale.
    """
    dim, groups = head_dim_of(attention), num_groups_of(attention)
    channels = kept_channels(dim, d_index).to(attention.q_proj.weight.device)
    scale = attention.scaling * d_index**0.5 if not hasattr(attention, "index_q_norm") else 1.0
    for name in ("weight", "bias"):
        q, k = getattr(attention.q_proj, name), getattr(attention.k_proj, name)
        if q is not None:
            mean = q.unflatten(0, (groups, -1, dim)).float().mean(1)[:, channels] * scale
            getattr(attention.index_q_proj, name).copy_(mean.flatten(0, 1))
        if k is not None:
            mean = k.unflatten(0, (-1, dim)).float().mean(0)[channels]
            getattr(attention.index_k_proj, name).copy_(mean)
    for ours, main in NORMS.items():
        if hasattr(attention, ours):
            for name, weight in getattr(attention, ours).named_parameters():
                weight.copy_(getattr(attention, main).get_parameter(name)[channels])


@torch.no_grad()
def start_at_random(attention: nn.Module, initialise) -> None:
    """Start the index as the model starts its own modules; `initialise` is its _init_weights."""
    for name in MODULES:
        if hasattr(attention, name):
            initialise(getattr(attention, name))


def index_of(
    attention: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], d_index: int
) -> tuple[Tensor, Tensor]:
    """q_index [b, t, g, d_index] and k_index [b, t, d_index] of hidden states [b, t, channels]."""
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
    dim = head_dim_of(attention)
    if d_index < dim:
        channels = kept_channels(dim, d_index).to(cos.device)
        cos, sin = cos[..., channels], sin[..., channels]
    turned = cos.shape[-1]  # fewer than d_index where RoPE turns a part of the head only
    pair = [x[..., :turned].transpose(1, 2) for x in (q, k)]
    pair = [x.transpose(1, 2) for x in attention.rotate(*pair, cos, sin)]
    if turned < d_index:
        pair = [torch.cat([x, rest[..., turned:]], -1) for x, rest in zip(pair, (q, k))]
    return pair
