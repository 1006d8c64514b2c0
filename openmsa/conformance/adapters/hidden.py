"""One hidden vector a token that holds q | k | v | q_index | k_index of all heads.

A layer of a foreign model projects hidden vectors and normalises heads; with projections that only
take channels out, and norms that do nothing, it computes on exactly the inputs of a case.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmsa.conformance.adapter import NotOffered
from openmsa.conformance.case import INDEX, MAIN, Inputs

NAMES = (*MAIN, *INDEX)
QUERIES = ("q", "q_index")


class Channels:
    """Where each of q, k, v, q_index, k_index lies in a hidden vector."""

    def __init__(self, x: Inputs):
        self.places, start = {}, 0
        for name in NAMES:
            width = getattr(x, name)[0, :1].numel()
            self.places[name] = (start, start + width)
            start += width
        self.width = start

    def hidden(self, x: Inputs) -> Tensor:
        """[b, s, width]; the first s - t tokens have zeros for queries."""
        before = x.k.shape[1] - x.q.shape[1]
        parts = []
        for name in NAMES:
            part = getattr(x, name)
            part = part.reshape(*part.shape[:2], -1)
            ahead = before if name in QUERIES else 0
            parts.append(torch.nn.functional.pad(part, (0, 0, ahead, 0)))
        return torch.cat(parts, -1)

    def take(self, name: str) -> nn.Module:
        """A projection that takes these channels out."""
        return _Taken(*self.places[name])


class _Taken(nn.Module):
    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.start : self.stop]


def require(condition: bool, what: str) -> None:
    """Raise NotOffered(what) unless the engine has what a case needs."""
    if not condition:
        raise NotOffered(what)


def plain_shape(x: Inputs) -> None:
    """What layers of models have in common: values as wide as keys, scales of 1 / sqrt(d)."""
    require(x.v.shape[-1] == x.k.shape[-1], "values of another width than keys")
    require(x.rule.scale is None and x.rule.index_scale is None, "scales other than 1 / sqrt(d)")


def plain_layout(x: Inputs) -> None:
    """Neither padded nor packed."""
    require(not x.packed, "packed sequences")
    require(x.mask is None, "padded rows")
