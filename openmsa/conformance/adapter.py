"""What an engine offers to the judge: any part of MSA, on inputs of any layout.

An engine is a class with methods of these names. What it lacks raises NotOffered with the reason,
and is reported as that: never as passed. Whatever else it raises is a failure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.conformance.case import GRADIENTS, INDEX, MAIN, Inputs, Rule


class NotOffered(Exception):
    """The engine has no such thing; the message says what it lacks."""


class Cache:
    """Keys, values and index keys of sequences that grow."""

    def append(self, x: Inputs) -> Tensor:
        """Tokens that follow what is held, q [b, t, h, d] ... -> their output [b, t, h, dv]."""
        raise NotOffered("appending to a cache")

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        raise NotOffered("cropping the cache")

    def reorder(self, rows: tuple[int, ...]) -> None:
        """Row i becomes what row rows[i] was; there may be more rows than before, or fewer."""
        raise NotOffered("reordering the rows of the cache")

    def reload(self) -> None:
        """Write everything held to bytes, forget it, and read it again."""
        raise NotOffered("writing the cache and reading it")


class Adapter:
    """One engine. `name` and `version()` are printed; `x` is described by Inputs.

    An engine that chooses its blocks itself may ignore x.blocks, but must refuse x.imposed.
    """

    name = "engine"

    def version(self) -> str:
        """What is judged: package and version."""
        return "unknown"

    def select(self, x: Inputs) -> Tensor:
        """Chosen blocks [b, g, t, any number], whole numbers in any order, -1 in empty slots."""
        raise NotOffered("returning the selection")

    def attend(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        """out [b, t, h, dv], and the natural log-sum-exp [b, t, h] or None."""
        raise NotOffered("attention")

    def loss(self, x: Inputs) -> Tensor:
        """The index loss, a number."""
        raise NotOffered("the index loss")

    def gradients(self, x: Inputs) -> dict[str, Tensor]:
        """Of sum(out * dout) + index loss, by name of GRADIENTS; those without are not offered.

        An engine without an index loss gives those of sum(out * dout): they are the same for q, k
        and v.
        """
        raise NotOffered("gradients")

    def open_cache(self, rule: Rule) -> Cache:
        """An empty cache."""
        raise NotOffered("a cache")


class TorchAdapter(Adapter):
    """An engine that torch differentiates: `attend` and `loss` are enough for its gradients."""

    def gradients(self, x: Inputs) -> dict[str, Tensor]:
        names = (*MAIN, *INDEX)
        leaves = [getattr(x, name).detach().clone().requires_grad_() for name in names]
        x = x.replace(**dict(zip(names, leaves)))
        with torch.enable_grad():
            total = (self.attend(x)[0] * x.dout).sum()
            trained = True
            try:
                total = total + self.loss(x)
            except NotOffered:
                trained = False
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        named = zip(GRADIENTS, leaves, found)
        named = {n: torch.zeros_like(leaf) if d is None else d for n, leaf, d in named}
        return named if trained else {name: named[name] for name in GRADIENTS[:3]}
