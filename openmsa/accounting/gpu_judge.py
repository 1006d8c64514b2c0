"""Whether what a GPU computed is right: the rule of `judge`, on its samples or on all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from openmsa.accounting.inputs import Inputs
from openmsa.accounting.judge import (
    Verdict,
    compare,
    judge_attention,
    judge_selection,
    sampled,
)
from openmsa.selection import Selection


def selection_verdict(x: Inputs, selection: Selection) -> Verdict:
    """Sampled choices against fp64."""
    index = Inputs(x.q, x.k, x.v, x.q_index.cpu(), x.k_index.cpu())
    return judge_selection(index, _here(selection), sampled(x.q_index.shape[1]))


def attention_verdict(x: Inputs, selection: Selection | None, out: Tensor) -> Verdict:
    """Sampled outputs against fp64; no selection: dense attention."""
    x = Inputs(*(y.detach().cpu() for y in (x.q, x.k, x.v, x.q_index, x.k_index)))
    return judge_attention(x, _here(selection), out.detach().cpu(), sampled(x.q.shape[1]))


def whole_verdicts(
    x: Inputs, selection: Selection | None, out: Tensor, dout: Tensor, gradients: Sequence[Tensor]
) -> tuple[Verdict, Verdict]:
    """(of out, of dq, dk and dv), every element, beside eager attention on the same device.

    Every score of a group is in memory: few thousand tokens only.
    """
    hidden, found = _hidden(x, selection), ([], [])
    for group in range(x.k.shape[2]):
        for kept, dtype in zip(found, (x.q.dtype, torch.float64)):
            kept.append(_attended(x, group, hidden[group], dout, dtype))
    eager, truth = ([torch.cat(parts, 1) for parts in zip(*kept)] for kept in found)
    forward, *backward = (
        compare(name, y[0].detach(), *others)
        for name, y, *others in zip(("out", "dq", "dk", "dv"), (out, *gradients), eager, truth)
    )
    return forward, backward[0].also(backward[1]).also(backward[2])


def _attended(x: Inputs, group: int, hidden: Tensor, dout: Tensor, dtype: torch.dtype):
    """out and dq [t, r, d], dk and dv [s, 1, d] of one group, in `dtype`."""
    r = x.q.shape[2] // x.k.shape[2]
    heads = slice(group * r, (group + 1) * r)
    parts = (x.q[0, :, heads], x.k[0, :, group], x.v[0, :, group])
    q, k, v = (part.detach().to(dtype).requires_grad_() for part in parts)
    with torch.enable_grad():
        scores = (q.transpose(0, 1) @ k.T) * q.shape[-1] ** -0.5
        out = (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(0, 1)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout[0, :, heads].to(dtype))
    return out.detach(), dq, dk[:, None], dv[:, None]


def loss_verdict(
    x: Inputs, selection: Selection | None, loss: Tensor, gradients: Sequence[Tensor]
) -> Verdict:
    """The index loss and its gradients for q_index and k_index, against fp64 and eager torch.

    Every score is in memory: few queries only.
    """
    hidden = _hidden(x, selection)
    eager, truth = (_loss(x, hidden, dtype) for dtype in (x.q.dtype, torch.float64))
    ours = (loss, *gradients)
    verdict = None
    for name, *three in zip(("loss", "dq_index", "dk_index"), ours, eager, truth):
        one, other, exact = (y.detach().reshape(-1) for y in three)
        found = compare(name, one.to(other.dtype), other, exact)
        verdict = found if verdict is None else verdict.also(found)
    return verdict


def _here(selection: Selection | None) -> Selection | None:
    return selection and Selection(selection.blocks.cpu(), selection.block_size)


def _hidden(x: Inputs, selection: Selection | None) -> Tensor:
    """Keys that a query must not read, bool [g, t, s]."""
    t, s, g = x.q.shape[1], x.k.shape[1], x.k.shape[2]
    here = x.q.device
    future = torch.arange(s, device=here) > torch.arange(s - t, s, device=here)[:, None]
    if selection is None:
        return future.expand(g, t, s)
    number = -(-s // selection.block_size)
    blocks = selection.blocks[0].long()
    chosen = torch.zeros(g, t, number + 1, dtype=torch.bool, device=here)
    chosen.scatter_(2, torch.where(blocks < 0, number, blocks), True)
    keys = chosen[..., :number].repeat_interleave(selection.block_size, 2)[..., :s]
    return future | ~keys


def _loss(x: Inputs, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The definition's sums in `dtype` with every score in memory: value and gradients."""
    g = x.k.shape[2]
    q, k = x.q[0].detach().to(dtype).unflatten(1, (g, -1)), x.k[0].detach().to(dtype)
    scores = torch.einsum("tgrd,sgd->grts", q, k) * q.shape[-1] ** -0.5
    teacher = scores.masked_fill(hidden[:, None], -math.inf).softmax(-1).mean(1)
    leaves = [y.detach().to(dtype).requires_grad_() for y in (x.q_index, x.k_index)]
    with torch.enable_grad():
        student = torch.einsum("tgd,sd->gts", leaves[0][0], leaves[1][0])
        student = (student * leaves[1].shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
        student = student.log_softmax(-1).masked_fill(hidden, 0)
        loss = (torch.xlogy(teacher, teacher) - teacher * student).sum(-1).mean()
    return loss, *torch.autograd.grad(loss, leaves)
