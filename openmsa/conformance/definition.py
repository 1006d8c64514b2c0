"""What must come out of a case: the reference backend in fp64; and what eager torch makes of it.

Both answer for one sequence at a time. A padded or packed batch is, by definition, its sequences
alone: outputs are put where they belong, and the loss is averaged over all query tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from openmsa import Selection, dense_attention, index_loss, select_blocks, sparse_attention
from openmsa.conformance.case import GRADIENTS, INDEX, MAIN, Inputs

# One sequence -> out [b, t, h, dv], lse [b, t, h], sum over its tokens and groups of w * KL.
Solver = Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]


def choose(x: Inputs) -> Tensor:
    """The selection of a case by the reference backend, int32 [b, g, t, top_k]."""
    rule = x.rule
    blocks = x.q.new_full((x.q.shape[0], x.k.shape[2], x.q.shape[1], rule.top_k), -1)
    blocks = blocks.to(torch.int32)
    for span in x.spans():
        one = x.only(span)
        chosen = select_blocks(
            one.q_index.double(),
            one.k_index.double(),
            block_size=rule.block_size,
            top_k=rule.top_k,
            local_blocks=rule.local_blocks,
            sink_blocks=rule.sink_blocks,
            index_scale=x.index_scale,
            backend="reference",
        )
        blocks[span.rows, :, span.queries] = chosen.blocks
    return blocks


def answers(x: Inputs, solve: Solver, *, with_loss: bool) -> dict[str, Tensor]:
    """out, lse, loss and the gradients of sum(out * dout) + loss, in the dtype of x.

    Gradients of the index only with the loss.
    """
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in (*MAIN, *INDEX)}
    x = x.replace(**leaves)
    out = x.q.new_zeros(*x.q.shape[:3], x.v.shape[3])
    lse = out.new_zeros(x.q.shape[:3], dtype=torch.promote_types(x.q.dtype, torch.float32))
    kl = weight = 0.0
    for span in x.spans():
        one = x.only(span)
        part, its_lse, its_kl = solve(one)
        out = _put(out, span, part)
        lse[span.rows, span.queries] = its_lse.detach().to(lse.dtype)
        kl = kl + its_kl
        weight += float(row_weights(one).sum()) * x.k.shape[2]
    total, found = (out * x.dout).sum(), {"out": out, "lse": lse}
    if with_loss:
        found["loss"] = kl / (weight or 1.0)
        total = total + found["loss"]
    wanted = dict(zip(GRADIENTS, leaves.values()))
    if not with_loss:
        wanted = {name: wanted[name] for name in GRADIENTS[:3]}
    found |= dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()))))
    return {name: tensor.detach() for name, tensor in found.items()}


def _put(whole: Tensor, span, part: Tensor) -> Tensor:
    """`whole` with one sequence written into it, differentiably."""
    whole = whole.clone()
    whole[span.rows, span.queries] = part.to(whole.dtype)
    return whole


def row_weights(x: Inputs) -> Tensor:
    """[b, t]: 1 where nothing is said; a query that sees no key cannot be."""
    return x.q.new_ones(x.q.shape[:2]) if x.row_weights is None else x.row_weights


def reference(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """A Solver: the reference backend."""
    how = {"backend": "reference", "scale": x.scale}
    if x.rule.phase == "warmup":
        selection = None
        out, lse = dense_attention(x.q, x.k, x.v, return_lse=True, **how)
    else:
        selection = Selection(x.blocks, x.rule.block_size)
        out, lse = sparse_attention(x.q, x.k, x.v, selection, return_lse=True, **how)
    weights = row_weights(x)
    loss = index_loss(
        x.q, x.k, x.q_index, x.k_index, selection,
        index_scale=x.index_scale, row_weights=weights, **how,
    )  # fmt: skip
    return out, lse, loss * weights.sum() * x.k.shape[2]


def eager(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """A Solver: what one writes in torch without further thought, everything in the dtype of x."""
    h, g = x.q.shape[2], x.k.shape[2]
    read = readable(x)
    k, v = (tensor.repeat_interleave(h // g, 2) for tensor in (x.k, x.v))
    scores = torch.einsum("bthd,bshd->bhts", x.q, k) * x.scale
    hidden = ~read.repeat_interleave(h // read.shape[1], 1)
    scores = scores.masked_fill(hidden, -math.inf)
    nothing = hidden.all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(nothing, 0)
    out = torch.einsum("bhts,bshd->bthd", weights, v)
    lse = scores.detach().to(torch.promote_types(x.q.dtype, torch.float32)).logsumexp(-1)

    teacher = weights.unflatten(1, (g, h // g)).mean(2).detach()
    student = torch.einsum("btgi,bsi->bgts", x.q_index, x.k_index) * x.index_scale
    student = student.masked_fill(~read, -math.inf).log_softmax(-1).masked_fill(~read, 0)
    kl = (torch.xlogy(teacher, teacher) - teacher * student).sum(-1)
    return out, lse.transpose(1, 2), (row_weights(x)[:, None] * kl).sum()


def readable(x: Inputs) -> Tensor:
    """Which keys each query of one sequence reads, bool [b, groups, t, s]."""
    t, s = x.q.shape[1], x.k.shape[1]
    key = torch.arange(s, device=x.q.device)
    causal = key <= torch.arange(s - t, s, device=x.q.device)[:, None]
    if x.rule.phase == "warmup":
        return causal.expand(x.q.shape[0], x.k.shape[2], t, s)
    block = key // x.rule.block_size
    return (x.blocks[..., None] == block).any(-2) & causal
