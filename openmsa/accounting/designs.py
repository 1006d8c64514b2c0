"""What each mechanism does for one query token that sees n keys, as products of queries with keys.

A Pass is one such product: its query heads meet `keys` keys each. Numbers are those that each
mechanism was published with, and its class names the source; `make` changes any of them.

dense    all n keys
msa      index: g heads over n index keys; then the top_k blocks
nsa      compressed: h heads over n / stride means; top_k blocks; the last window_tokens
moba     h heads over the means of whole blocks; then top_k blocks, each head its own
infllm2  h heads over n / stride means, and over four times coarser ones for the normaliser; then
         the top_k + local_blocks blocks; dense where the sequence has at most dense_tokens
dsa      index: index_heads over n index keys; then the top_k tokens
window   the first sink_tokens and the last window_tokens

Counted are these products. Softmax, norms, means and picking the largest are not: they are linear
in what is counted, without the factor of a head's channels.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from openmsa.accounting.shapes import Shape


@dataclass(frozen=True)
class Pass:
    """`heads` query heads meet `keys` keys each, a number per query token (Tensor, any shape).

    d, d_value: channels of a query and of what it takes away (0: a score, which is not kept).
    width: stored channels of a key and its value, all KV heads together.
    blocks: where keys are gathered, how many pieces they come in; None: read in a row.
    read: keys that one query token's heads need of a KV head; left out: those they meet.
    of_index: stored as index keys are, else as the cache is.
    """

    name: str
    heads: int
    keys: Tensor
    d: int
    d_value: int
    width: int
    blocks: Tensor | None = None
    read: Tensor | None = None
    chooses: bool = False
    of_index: bool = False


@dataclass(frozen=True)
class Dense:
    """Every visible key."""

    source = "arXiv 2305.13245"
    index_bytes = None  # of an index key's channel; None: as the cache has it

    def passes(self, n: Tensor, s: int, shape: Shape) -> list[Pass]:
        """n: visible keys of each query token; s: tokens of its sequence."""
        return [_attend("all", n, shape)]

    def is_dense(self, s: int) -> bool:
        """Whether a sequence of s tokens is attended to as dense attention does."""
        return type(self) is Dense

    def index_width(self, s: int, shape: Shape) -> int:
        """Channels kept of s tokens beside keys and values, all as index keys are."""
        return 0

    def kept_rows(self, s: int) -> int:
        """Tokens whose keys and values are kept of s."""
        return s

    def extra_weights(self, shape: Shape) -> int:
        """Weights of a layer beyond those of dense attention."""
        return 0

    @property
    def budget_tokens(self) -> int | None:
        """Tokens that a query reads at most; None: all."""
        return None


@dataclass(frozen=True)
class MSA(Dense):
    block_size: int = 128
    top_k: int = 16
    d_index: int | None = None
    index_bytes: int | None = None
    source = "arXiv 2606.13392 section 5.1; d_index from its 28.4x"

    def passes(self, n: Tensor, s: int, shape: Shape) -> list[Pass]:
        di = self.d_index or shape.d_index
        return [
            Pass("index", shape.g, n, di, 0, di, chooses=True, of_index=True),
            _attend_blocks(n, self.block_size, self.top_k, shape),
        ]

    def index_width(self, s: int, shape: Shape) -> int:
        return s * (self.d_index or shape.d_index)

    def extra_weights(self, shape: Shape) -> int:
        return shape.d_model * (shape.g + 1) * (self.d_index or shape.d_index)

    @property
    def budget_tokens(self) -> int:
        return self.block_size * self.top_k


@dataclass(frozen=True)
class NSA(Dense):
    """Three branches with keys and values of their own, and a gate per branch and head."""

    compress_tokens: int = 32
    stride_tokens: int = 16
    block_size: int = 64
    top_k: int = 16
    window_tokens: int = 512
    source = "arXiv 2502.11089 section 4.1"

    def passes(self, n: Tensor, s: int, shape: Shape) -> list[Pass]:
        means = _windows(n, self.compress_tokens, self.stride_tokens)
        compressed = _attend("compressed", means, shape)
        return [
            dataclasses.replace(compressed, chooses=True),
            _attend_blocks(n, self.block_size, self.top_k, shape),
            _attend("window", n.clamp(max=self.window_tokens), shape),
        ]

    def kept_rows(self, s: int) -> int:
        means = max(0, (s - self.compress_tokens) // self.stride_tokens + 1)
        return s + means + min(s, self.compress_tokens) + min(s, self.window_tokens)

    def extra_weights(self, shape: Shape) -> int:
        return shape.d_model * (2 * shape.kv_width + 3 * shape.h)

    @property
    def budget_tokens(self) -> int:
        return self.block_size * self.top_k + self.window_tokens


@dataclass(frozen=True)
class MoBA(Dense):
    """Heads share no choice: at worst each of r heads reads other blocks, all read their own."""

    block_size: int = 4096
    top_k: int = 12
    source = "arXiv 2502.13189, its 1M model, as remembered"

    def passes(self, n: Tensor, s: int, shape: Shape) -> list[Pass]:
        means = (n - 1) // self.block_size
        width = shape.g * shape.d
        chosen = _attend_blocks(n, self.block_size, self.top_k, shape)
        others = chosen.keys - ((n - 1) % self.block_size + 1)
        apart = n.minimum(chosen.keys + (shape.r - 1) * others)
        return [
            Pass("means", shape.h, means, shape.d, 0, width, chooses=True),
            dataclasses.replace(chosen, read=apart),
        ]

    def index_width(self, s: int, shape: Shape) -> int:
        return s // self.block_size * shape.g * shape.d

    @property
    def budget_tokens(self) -> int:
        return self.block_size * self.top_k


@dataclass(frozen=True)
class InfLLM2(Dense):
    compress_tokens: int = 32
    stride_tokens: int = 16
    block_size: int = 64
    top_k: int = 64
    local_blocks: int = 32
    dense_tokens: int = 8192
    source = "arXiv 2509.24663; sparse_config of MiniCPM4.1"

    def is_dense(self, s: int) -> bool:
        return s <= self.dense_tokens

    def passes(self, n: Tensor, s: int, shape: Shape) -> list[Pass]:
        if self.is_dense(s):
            return [_attend("all", n, shape)]
        width = shape.g * shape.d
        rows = [_windows(n, m * self.compress_tokens, m * self.stride_tokens) for m in (1, 4)]
        return [
            Pass("means", shape.h, rows[0], shape.d, 0, width, chooses=True),
            Pass("coarse", shape.h, rows[1], shape.d, 0, width, chooses=True),
            _attend_blocks(n, self.block_size, self.top_k + self.local_blocks, shape),
        ]

    def index_width(self, s: int, shape: Shape) -> int:
        rows = 0
        for m in (1, 4):
            length, stride = m * self.compress_tokens, m * self.stride_tokens
            rows += max(0, (s - length) // stride + 1)
        return rows * shape.g * shape.d

    @property
    def budget_tokens(self) -> int:
        return self.block_size * (self.top_k + self.local_blocks)


@dataclass(frozen=True)
class DSA(Dense):
    """All heads share one set of tokens. Index keys take one byte a channel."""

    top_k: int = 2048
    index_heads: int = 64
    d_index: int = 128
    index_bytes: int | None = 1
    source = "arXiv 2512.02556; config.json of DeepSeek-V3.2-Exp"

    def passes(self, n: Tensor, s: int, shape: Shape) -> list[Pass]:
        di = self.d_index
        chosen = n.clamp(max=self.top_k)
        return [
            Pass("index", self.index_heads, n, di, 0, di, chooses=True, of_index=True),
            dataclasses.replace(_attend("tokens", chosen, shape), blocks=chosen),
        ]

    def index_width(self, s: int, shape: Shape) -> int:
        return s * self.d_index

    def extra_weights(self, shape: Shape) -> int:
        heads = self.index_heads
        q = (shape.q_rank or shape.d_model) * heads * self.d_index
        return q + shape.d_model * (self.d_index + heads)

    @property
    def budget_tokens(self) -> int:
        return self.top_k


@dataclass(frozen=True)
class Window(Dense):
    window_tokens: int = 4096
    sink_tokens: int = 4
    source = "window of Mistral 7B (arXiv 2310.06825), sinks of StreamingLLM (arXiv 2309.17453)"

    def passes(self, n: Tensor, s: int, shape: Shape) -> list[Pass]:
        return [_attend("window", n.clamp(max=self.budget_tokens), shape)]

    def kept_rows(self, s: int) -> int:
        return min(s, self.budget_tokens)

    @property
    def budget_tokens(self) -> int:
        return self.window_tokens + self.sink_tokens


DESIGNS: dict[str, type[Dense]] = {
    "dense": Dense,
    "msa": MSA,
    "nsa": NSA,
    "moba": MoBA,
    "infllm2": InfLLM2,
    "dsa": DSA,
    "window": Window,
}


def make(name: str, changes: Mapping[str, int] | None = None) -> Dense:
    """The mechanism with that name, with some of its numbers changed."""
    if name not in DESIGNS:
        near = difflib.get_close_matches(name, DESIGNS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DESIGNS)}"
        raise ValueError(f"there is no mechanism {name!r}; {hint}")
    fields = [field.name for field in dataclasses.fields(DESIGNS[name])]
    for key, value in (changes or {}).items():
        if key not in fields:
            raise ValueError(f"{name} has no number {key!r}; it has {', '.join(fields) or 'none'}")
        least = 0 if key in ("sink_tokens", "local_blocks", "dense_tokens") else 1
        if value < least:
            raise ValueError(f"{name}.{key} must be at least {least}, got {value}")
    return DESIGNS[name](**(changes or {}))


def _attend(name: str, keys: Tensor, shape: Shape) -> Pass:
    return Pass(name, shape.h, keys, shape.d, shape.d_value, shape.kv_width)


def _attend_blocks(n: Tensor, size: int, k: int, shape: Shape) -> Pass:
    """The query's own block up to itself, and k - 1 whole ones where there are so many."""
    blocks = ((n + size - 1) // size).clamp(max=k)
    keys = (blocks - 1) * size + (n - 1) % size + 1
    return dataclasses.replace(_attend("blocks", keys, shape), blocks=blocks)


def _windows(n: Tensor, length: int, stride: int) -> Tensor:
    """Whole windows of that length that start every `stride` tokens and end within n."""
    return ((n - length) // stride + 1).clamp(min=0)
