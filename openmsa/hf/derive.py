"""Where an index starts from: the keys and queries that the dense model already has.

RoPE turns channels in pairs, so for one pair a query and a key are complex numbers, and their part
of a logit is Re(q conj(k)). The heads r of a group share queries' mean; all groups must share one
index key. For every pair:

    k_index   = sum_r a_r k_r          the direction in which the groups' keys vary most (leading
                                       eigenvector, groups weighted by the size of their queries)
    k_r      ~= c_r k_index            least squares
    q_index_r = conj(c_r) q_r          so that Re(q_index_r conj(k_index)) ~= Re(q_r conj(k_r))

a narrower index keeps the pairs with the largest eigenvalues. Both are linear in the hidden states,
hence rows of the index projections. (With the mean of the keys, a = c = 1, groups cancel each other
out; what that costs is in LOG.md.)
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from openmsa.hf.index_branch import head_dim_of, num_groups_of

SAMPLE_TOKENS = 256


@dataclass(frozen=True, eq=False)
class Sample:
    """hidden [tokens, channels] that an attention module receives; RoPE turns `turned` channels."""

    hidden: Tensor
    turned: int


@torch.no_grad()
def samples_of(model: PreTrainedModel, attentions: list[nn.Module]) -> list[Sample]:
    """What the attention modules receive for a row of random tokens.

    Random tokens do as well as text here: only covariances between heads are read off them.
    """
    device, vocabulary = next(model.parameters()).device, model.config.vocab_size
    tokens = min(SAMPLE_TOKENS, getattr(model.config, "max_position_embeddings", SAMPLE_TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
    seen: dict[nn.Module, Sample] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen[module] = Sample(hidden[0].float(), kwargs["position_embeddings"][0].shape[-1])

    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in attentions]
    try:
        with _evaluating(model):
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[attention] for attention in attentions]


@contextmanager
def _evaluating(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def derive_from_main(
    attention: nn.Module, sample: Sample, d_index: int, heads: int | None = None
) -> None:
    """Start the index of a layer from its main branch, by what that does with `sample`.

    heads: index queries, each from the mean of its share of the query heads; None: one per group.
    """
    hidden = sample.hidden
    pairs = pairs_of(attention.rotate, sample.turned, head_dim_of(attention)).to(hidden.device)
    every = _rows(attention, "q", hidden).unflatten(0, (num_groups_of(attention), -1))
    queries, keys = (_complex(x, pairs) for x in (every.mean(1), _rows(attention, "k", hidden)))
    a, c, importance = shared_key(*(_values(x, hidden) for x in (queries, keys)))
    back = c.conj().T[..., None]
    if heads is None:
        queries = queries * back
    else:
        queries = _complex(every.flatten(0, 1), pairs).unflatten(0, every.shape[:2])
        queries = (queries * back[:, None]).flatten(0, 1).unflatten(0, (heads, -1)).mean(1)
    keys = (keys * a.T[..., None]).sum(0, keepdim=True)
    if d_index < head_dim_of(attention):
        kept = importance.topk(d_index // 2).indices.sort().values
        attention.index_channels.copy_(pairs[:, kept].flatten())
        queries, keys, pairs = queries[:, kept], keys[:, kept], torch.arange(d_index).view(2, -1)
    _write(attention, "q", _real(queries, pairs), hidden, attention.scaling * d_index**0.5)
    _write(attention, "k", _real(keys, pairs), hidden, 1.0)


def _complex(rows: Tensor, pairs: Tensor) -> Tensor:
    return torch.complex(rows[:, pairs[0]], rows[:, pairs[1]])


def _real(rows: Tensor, pairs: Tensor) -> Tensor:
    """Back to a row for every channel, in their order."""
    return torch.cat([rows.real, rows.imag], 1)[:, pairs.flatten().argsort()]


def _values(rows: Tensor, hidden: Tensor) -> Tensor:
    """rows [groups, pairs, channels + 1] of a projection, applied: [n, pairs, groups]."""
    return torch.einsum("nc,gpc->npg", hidden.cfloat(), rows[..., :-1]) + rows[..., -1].T


def shared_key(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One key for all groups, from samples q and k, complex [n, pairs, groups].

    Returns a, c [pairs, groups] and importance [pairs]. sum over g of a_g k_g is the shared key, of
    the mean size of the k_g; c_g times it comes closest to k_g where the queries are large. For one
    group, a = c = 1.
    """
    gram = torch.einsum("npg,nph->pgh", k, k.conj()).cpu().to(torch.complex128) / k.shape[0]
    weight = q.abs().square().mean(0).sqrt().cpu().double() + 1e-12
    values, vectors = torch.linalg.eigh(gram * weight[:, :, None] * weight[:, None, :])
    leading = vectors[..., -1]
    leading = leading * torch.exp(-1j * leading[:, :1].angle())  # else its phase is arbitrary
    a = leading.conj() * weight
    size = torch.einsum("pg,pgh,ph->p", a, gram, a.conj()).real.clamp_min(1e-30)
    mean_size = gram.diagonal(dim1=1, dim2=2).real.mean(1)
    a = a * (mean_size / size).sqrt()[:, None]
    c = torch.einsum("pgh,ph->pg", gram, a.conj()) / mean_size.clamp_min(1e-30)[:, None]
    return *(x.cfloat().to(k.device) for x in (a, c)), values[:, -1].to(k.device)


def pairs_of(rotate, turned: int, dim: int) -> Tensor:
    """Which channels RoPE turns together, int64 [2, dim / 2]; those it leaves alone two and two.

    A quarter turn moves the first channel of a pair onto the second.
    """
    x = torch.eye(turned).view(1, 1, turned, turned)
    quarter = rotate(x, x, torch.zeros(1, turned, turned), torch.ones(1, turned, turned))[0][0, 0]
    rest = torch.arange(turned, dim).view(-1, 2)
    return torch.cat([(quarter > 0.5).nonzero(), rest]).T


def _rows(attention: nn.Module, part: str, hidden: Tensor) -> Tensor:
    """A projection with its norm as a factor, [heads, d, channels + 1]; the bias comes last."""
    proj, norm = getattr(attention, f"{part}_proj"), getattr(attention, f"{part}_norm", None)
    bias = torch.zeros_like(proj.weight[:, 0]) if proj.bias is None else proj.bias
    rows = torch.cat([proj.weight, bias[:, None]], 1).float()
    rows = rows.unflatten(0, (-1, head_dim_of(attention)))
    if norm is None:
        return rows
    values = torch.einsum("nc,hdc->nhd", hidden, rows[..., :-1]) + rows[..., -1]
    size = values.square().mean((0, 2)).sqrt() + 1e-12
    return rows * (_gain(norm, rows.shape[1]) / size[:, None])[..., None]


def _write(attention: nn.Module, part: str, rows: Tensor, hidden: Tensor, scale: float) -> None:
    """Set an index projection, and its norm to make vectors as large as `rows` make them."""
    proj = getattr(attention, f"index_{part}_proj")
    norm = getattr(attention, f"index_{part}_norm", None)
    rows = rows.flatten(0, 1)
    if norm is None:
        rows = rows * scale
    else:
        values = hidden @ rows[:, :-1].T + rows[:, -1]
        _set_gain(norm, scale * values.square().mean().sqrt())
        main = getattr(attention, f"{part}_proj").weight.float()  # the norm leaves the size free
        rows = rows * (main.square().mean() / rows[:, :-1].square().mean()).sqrt()
    proj.weight.copy_(rows[:, :-1])
    if proj.bias is not None:
        proj.bias.copy_(rows[:, -1])


def _gain(norm: nn.Module, dim: int) -> Tensor:
    """What the norm multiplies every channel by, [dim], whatever its weights mean."""
    like = next(norm.parameters(), torch.empty(0))
    signs = torch.ones(dim, device=like.device, dtype=like.dtype)
    signs[1::2] = -1  # of size 1, of mean 0
    return (norm(signs) * signs).float()


def _set_gain(norm: nn.Module, gain: Tensor) -> None:
    for parameter in norm.parameters():
        parameter.zero_()
    weight = getattr(norm, "weight", None)
    if weight is not None:
        weight.fill_(gain - _gain(norm, weight.shape[0]).mean())  # some add 1 to their weight
