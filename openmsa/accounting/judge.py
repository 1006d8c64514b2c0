"""Whether what was just timed is right: sampled rows against fp64, by another route than kernels.

A row is one query token and one group: its keys are gathered by slicing, and attention is four
lines of torch with autograd. The rule is the house's: mean and largest error against fp64 at most
twice what the same four lines get wrong in the dtype that was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.accounting.inputs import Inputs
from openmsa.selection import Selection

SAMPLES = 6


@dataclass(frozen=True)
class Verdict:
    """ok, and in words how far off."""

    ok: bool
    words: str

    def also(self, other: Verdict) -> Verdict:
        return Verdict(self.ok and other.ok, f"{self.words}; {other.words}")


def sampled(t: int, samples: int = SAMPLES) -> list[int]:
    """Query tokens spread evenly, the first and the last among them."""
    return sorted({round(i * (t - 1) / max(1, samples - 1)) for i in range(samples)})


def judge_selection(x: Inputs, selection: Selection, tokens: Sequence[int]) -> Verdict:
    """Own block kept, the best others kept; blocks may change places where fp64 sees a tie.

    A tie: nearer than fp32 sums of d_index products can tell apart.
    """
    _, g, _, k = selection.blocks.shape
    s, size, t = x.k_index.shape[1], selection.block_size, selection.blocks.shape[2]
    worst = 0.0
    for token in tokens:
        position = s - t + token
        own = position // size
        keys = x.k_index[0, : position + 1].double()
        scores = x.q_index[0, token].double() @ keys.T / x.q_index.shape[-1] ** 0.5
        short = (own + 1) * size - scores.shape[1]
        best = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        best = best.view(g, own + 1, size).amax(-1)
        tie = 1e-5 * float(scores.abs().max())
        for group in range(g):
            row = selection.blocks[0, group, token].tolist()
            kept = [block for block in row if block >= 0]
            right = kept == sorted(set(kept)) and row[: len(kept)] == kept
            if not right or own not in kept or len(kept) != min(k, own + 1) or kept[-1] > own:
                return Verdict(False, f"token {token}, group {group}: malformed choice {row}")
            rest = torch.ones(own + 1, dtype=torch.bool)
            rest[kept] = False
            others = [block for block in kept if block != own]
            if others and rest.any():
                gap = float(best[group][rest].max() - best[group][others].min())
                worst = max(worst, gap / tie)
    if worst > 1:
        return Verdict(False, f"a better block was left out ({worst:.0f} times what is a tie)")
    return Verdict(True, f"{len(tokens) * g} choices as in fp64")


def judge_attention(
    x: Inputs, selection: Selection | None, out: Tensor, tokens: Sequence[int]
) -> Verdict:
    """out [1, t, h, d] at `tokens`, every head."""
    ours, eager, truth = [], [], []
    for token, group, keys in _rows(x, selection, tokens):
        heads = _heads(x, group)
        ours.append(out[0, token, heads])
        q, k, v = x.q[0, token, heads], x.k[0, keys, group], x.v[0, keys, group]
        eager.append(_attend(q, k, v))
        truth.append(_attend(q.double(), k.double(), v.double()))
    return compare("out", torch.cat(ours), torch.cat(eager), torch.cat(truth))


def judge_gradients(
    x: Inputs, selection: Selection | None, dout: Tensor, gradients: Sequence[Tensor]
) -> Verdict:
    """dq at sampled tokens; dk and dv of one late block of keys in the first group.

    A late block has few readers, so that all of them can be worked through one by one.
    """
    dq, dk, dv = gradients
    t, s = x.q.shape[1], x.k.shape[1]
    size = 128 if selection is None else selection.block_size
    block = max(0, (s - 1) // size - 1)
    own = range(block * size, min(s, (block + 1) * size))
    rows = [[], [], []]  # of dq: ours, eager, truth
    for token, group, keys in _rows(x, selection, sampled(t, 4)):
        rows[0].append(dq[0, token, _heads(x, group)])
        for place, dtype in ((1, x.q.dtype), (2, torch.float64)):
            rows[place].append(_gradients(x, token, group, keys, dout, dtype)[0])
    verdict = compare("dq", *map(torch.cat, rows))
    readers = range(max(0, own.start - (s - t)), t)
    eager, truth = (_key_sums(x, selection, dout, own, readers, kind) for kind in (x.q.dtype, None))
    for name, ours, *others in (("dk", dk, eager[0], truth[0]), ("dv", dv, eager[1], truth[1])):
        verdict = verdict.also(compare(name, ours[0, own.start : own.stop, 0], *others))
    return verdict


def _key_sums(
    x: Inputs,
    selection: Selection | None,
    dout: Tensor,
    own: range,
    readers: range,
    dtype: torch.dtype | None,
) -> Tensor:
    """dk and dv [2, own keys, d] of the first group: rows in `dtype` added up in fp32, as a product
    of matrices would; without a dtype all of it in fp64.
    """
    sums = torch.zeros(2, len(own), x.k.shape[-1], dtype=torch.float32 if dtype else torch.float64)
    for token, _, keys in _rows(x, selection, readers, groups=(0,)):
        here = (keys >= own.start) & (keys < own.stop)
        if here.any():
            rows = _gradients(x, token, 0, keys, dout, dtype or torch.float64)[1:]
            for total, row in zip(sums, rows):
                total[keys[here] - own.start] += row[here].to(sums.dtype)
    return sums.to(dtype) if dtype else sums


def _rows(
    x: Inputs, selection: Selection | None, tokens: Sequence[int], groups: Sequence[int] = ()
) -> Iterator[tuple[int, int, Tensor]]:
    """(query token, group, the keys it may read) for every token and group asked for."""
    t, s, g = x.q.shape[1], x.k.shape[1], x.k.shape[2]
    for token in tokens:
        visible = torch.arange(s - t + token + 1)
        for group in groups or range(g):
            if selection is None:
                yield token, group, visible
                continue
            blocks = selection.blocks[0, group, token]
            size = selection.block_size
            parts = [visible[m * size : (m + 1) * size] for m in blocks.tolist() if m >= 0]
            yield token, group, torch.cat(parts)


def _heads(x: Inputs, group: int) -> slice:
    r = x.q.shape[2] // x.k.shape[2]
    return slice(group * r, (group + 1) * r)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [r, d], k and v [n, d] -> [r, d]"""
    return ((q @ k.T) * q.shape[-1] ** -0.5).softmax(-1) @ v


def _gradients(x: Inputs, token: int, group: int, keys: Tensor, dout: Tensor, dtype: torch.dtype):
    """dq [r, d], dk and dv [n, d] of one row, by autograd in `dtype`."""
    heads = _heads(x, group)
    parts = (x.q[0, token, heads], x.k[0, keys, group], x.v[0, keys, group])
    leaves = [part.detach().to(dtype).requires_grad_() for part in parts]
    with torch.enable_grad():
        out = _attend(*leaves)
    return torch.autograd.grad(out, leaves, dout[0, token, heads].to(dtype))


def compare(name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> Verdict:
    """The rule of the house, on tensors of one shape."""
    ours, eager, truth = (y.detach() for y in (ours, eager, truth))
    last_place = torch.finfo(ours.dtype).eps * float(truth.abs().max())
    error, allowed = ((y.double() - truth).abs() for y in (ours, eager))
    mean = float(error.mean() / allowed.mean().clamp(min=1e-300))
    ok = float(error.max()) <= 2 * float(allowed.max()) + last_place and mean <= 2
    return Verdict(ok, f"{name} error {mean:.2g} of eager's")
