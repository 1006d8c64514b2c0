"""A mechanism as an attention layer of transformers meets it.

One small object per converted layer says which modules the mechanism adds and how they start, what
it reads off the hidden states, and how it attends. Everything else in openmsa.hf (cache, layout,
losses, phases, loading) speaks to this object and knows no mechanism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from openmsa.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from openmsa.hf.attention import AttentionCall
    from openmsa.hf.derive import Sample


@dataclass(frozen=True, eq=False)
class Tensors:
    """What one attention call reads, each by its name in the mechanism's one call.

    queries: q [b, t, h, d], and what else a query token brings, [b, t, ...]. keys: k and v
    [b, s, g, d], and what else is kept of every token, [b, s, ...]. pooled: what a cache keeps of
    every whole window, [b, n, g, ...].
    """

    queries: dict[str, Tensor]
    keys: dict[str, Tensor]
    pooled: dict[str, Tensor] = field(default_factory=dict)

    def each(
        self, on_queries: Callable[[Tensor], Tensor], on_keys: Callable[[Tensor], Tensor]
    ) -> Tensors:
        """The same names with each side changed by its function; before anything is pooled."""
        queries = {name: on_queries(x) for name, x in self.queries.items()}
        return Tensors(queries, {name: on_keys(x) for name, x in self.keys.items()})

    def in_one_dtype(self) -> Tensors:
        """As autocast wants it, like transformers' own attention; without autocast, as v."""
        v = self.keys["v"]
        kind = v.device.type
        auto = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if auto else v.dtype
        return self.each(lambda x: x.to(dtype), lambda x: x.to(dtype))

    def named(self) -> dict[str, Tensor]:
        """All in one."""
        return {**self.queries, **self.keys, **self.pooled}


class Attended(Protocol):
    """What the one call of every mechanism returns, at least."""

    out: Tensor
    index_loss: Tensor | None
    selection: Selection | None
    lse: Tensor | None


@dataclass(frozen=True)
class Budget:
    """What a query reads at most where blocks are chosen: top_k of block_size tokens.

    local_blocks latest and sink_blocks first ones among them are always read. Sequences of fewer
    than dense_below tokens are not selected from.
    """

    block_size: int
    top_k: int
    local_blocks: int = 0
    sink_blocks: int = 0
    dense_below: int = 0

    @property
    def tokens(self) -> int:
        """Up to so many tokens of a sequence, every one is read."""
        return max(self.block_size * self.top_k, self.dense_below - 1)


@dataclass(frozen=True)
class Room:
    """One mechanism with the numbers of `config`; subclasses say what is different.

    NAME: as in config.json. PHASES: those of the mechanism. ADDED: names of the modules and
    parameters it adds to an attention module. INDEX: whether it has an index, which learns from a
    loss of its own and whose key is kept of every token.
    """

    config: Any

    NAME: ClassVar[str]
    CONFIG: ClassVar[type]
    PHASES: ClassVar[tuple[str, ...]]
    ADDED: ClassVar[tuple[str, ...]] = ()
    INDEX: ClassVar[bool] = False

    def check(self, model: PreTrainedModel, attention: nn.Module, init: str) -> None:
        """Raises ValueError for a layer that this mechanism, or these numbers, cannot serve; init:
        what its modules start from, "main" or "random"."""

    def add(self, attention: nn.Module) -> None:
        """Give `attention` the modules of ADDED, not initialised."""

    def start(self, attention: nn.Module, initialise: Callable[[nn.Module], None]) -> None:
        """Start them without a sample; `initialise` is the model's own _init_weights."""

    def derive(self, attention: nn.Module, sample: Sample) -> None:
        """Start them from what the main branch does with `sample`."""

    def remove(self, attention: nn.Module) -> None:
        """Take them away again."""
        for name in self.ADDED:
            if hasattr(attention, name):
                delattr(attention, name)

    def read(
        self, attention: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the tokens bring beside q, k and v: by name, [b, t, ...], and their index keys.

        hidden [b, t, channels]. Index keys [b, t, d_index] are kept by the cache; None without an
        index.
        """
        return {}, None

    def attend(
        self, attention: nn.Module, tensors: Tensors, *, with_index_loss: bool, **how
    ) -> Attended:
        """The one call of the mechanism. how: phase, scale, cu_seqlens_q and cu_seqlens_k."""
        raise TypeError(f"{type(self).__name__} does not say how it attends")

    @property
    def windows(self) -> tuple[int, int] | None:
        """Tokens of a window, and from one's beginning to the next's; None where none is pooled."""
        return None

    def pool(self, attention: nn.Module, keys: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a cache may keep of every whole window of keys [b, s, ...]: by name [b, n, g, ...].

        Windows are counted from the first token and end with the last whole one.
        """
        raise TypeError(f"{type(self).__name__} does not say what it pools")

    def check_context(self) -> None:
        """Raises ValueError where a process that holds a part of a sequence could not do as one
        that holds it all."""

    def index_scale(self, attention: nn.Module) -> float | None:
        """What the index's scores are multiplied by; None without an index."""
        return None

    @property
    def budget(self) -> Budget | None:
        """What is chosen of a context; None where nothing is, as in a plain window."""
        return None

    def select(self, call: AttentionCall) -> Selection:
        """What the index of a captured call would select, in whatever phase it was.

        Raises ValueError without an index.
        """
        raise ValueError(
            f"{self.NAME} selected nothing in layer {call.layer}: it was in the phase 'dense', or "
            "the sequence was too short"
        )
