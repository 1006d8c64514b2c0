"""What the two MLX adapters share: an attention layer that takes hidden vectors."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import torch
from torch import Tensor

from openmsa.conformance.adapter import Adapter
from openmsa.conformance.adapters.hidden import Channels, plain_shape, require
from openmsa.conformance.adapters.mlx_arrays import to_mlx, to_torch
from openmsa.conformance.case import GRADIENTS, Inputs

Layer = Callable[[mx.array, object], mx.array]  # hidden [b, t, width], cache -> out [b, t, h * d]


class MlxAdapter(Adapter):
    """Attention and gradients from `layer(x)` and `new_cache()`."""

    def layer(self, x: Inputs, channels: Channels) -> Layer:
        """The attention layer for inputs of this shape."""
        raise TypeError("an MLX adapter says what its layer is")

    def new_cache(self, left_padding: list[int] | None = None):
        """An empty cache of one layer; of a batch with so many padded tokens before each row."""
        raise TypeError("an MLX adapter says what its cache is")

    def check(self, x: Inputs) -> None:
        """Raise NotOffered for inputs that the layer does not take."""
        require(not x.packed, "packed sequences")
        require(x.mask is None or bool(x.mask[:, -1].all()), "rows padded on the right")
        plain_shape(x)
        require(not x.imposed, "attention to blocks that are given")

    def after_prefix(self, layer: Layer, hidden: mx.array, x: Inputs):
        """Hidden vectors of the queries, and the cache of the tokens before them."""
        if x.mask is not None:
            return hidden, self.new_cache((~x.mask).sum(1).tolist())
        before = x.k.shape[1] - x.q.shape[1]
        if before == 0:
            return hidden, None
        cache = self.new_cache()
        layer(hidden[:, :before], cache)
        return hidden[:, before:], cache

    def attend(self, x: Inputs) -> tuple[Tensor, None]:
        self.check(x)
        channels = Channels(x)
        layer = self.layer(x, channels)
        out = layer(*self.after_prefix(layer, to_mlx(channels.hidden(x)), x))
        return to_torch(out).unflatten(-1, x.q.shape[2:]), None

    def gradients(self, x: Inputs) -> dict[str, Tensor]:
        self.check(x)
        channels, t = Channels(x), x.q.shape[1]
        layer, dout = self.layer(x, channels), to_mlx(x.dout.flatten(2))

        def total(hidden: mx.array) -> mx.array:
            return (layer(*self.after_prefix(layer, hidden, x)) * dout).sum()

        found = to_torch(mx.grad(total)(to_mlx(channels.hidden(x))))
        named = {}
        for name, gradient in zip(("q", "k", "v"), GRADIENTS):
            part = channels.take(name)(found)
            part = part[:, -t:] if name == "q" else part
            named[gradient] = part.unflatten(-1, getattr(x, name).shape[2:])
        return named


def blocks_of(keep: mx.array, x: Inputs) -> Tensor:
    """Whether a head may read a key [b, h or 1, t, s] -> blocks [b, g or 1, t, n], -1 elsewhere."""
    kept = to_torch(keep)
    if kept.shape[1] > 1:
        kept = kept.unflatten(1, (x.k.shape[2], -1))[:, :, 0]
    short = -kept.shape[-1] % x.rule.block_size
    kept = torch.nn.functional.pad(kept, (0, short), value=False)
    kept = kept.unflatten(-1, (-1, x.rule.block_size)).any(-1)
    return torch.where(kept, torch.arange(kept.shape[-1]), -1)


def visible_blocks(x: Inputs) -> Tensor:
    """Every block that holds a visible key: what a layer reads that does not choose."""
    t, s = x.q.shape[1], x.k.shape[1]
    own = torch.arange(s - t, s)[:, None] // x.rule.block_size
    number = torch.arange(-(-s // x.rule.block_size))
    blocks = torch.where(number <= own, number, -1)
    return blocks.expand(x.q.shape[0], x.k.shape[2], -1, -1)


def taking(channels: Channels, name: str) -> Callable[[mx.array], mx.array]:
    """A projection that takes the channels of `name` out of a hidden vector."""
    start, stop = channels.places[name]
    return lambda hidden: hidden[..., start:stop]


def unchanged(x: mx.array, **_) -> mx.array:
    """A norm, a rotation or a projection that does nothing."""
    return x
