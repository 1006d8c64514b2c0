"""Our own backends: the four doors, and the cache of converted models."""

from __future__ import annotations

import pickle

import torch
from torch import Tensor

import openmsa
from openmsa.conformance.adapter import Cache, NotOffered, TorchAdapter
from openmsa.conformance.adapters import package_version
from openmsa.conformance.case import Inputs, Rule
from openmsa.ops.backend import availability
from openmsa.selection import Selection


class Ours(TorchAdapter):
    """One backend. Raises ImportError where it is not usable."""

    backend = "reference"

    def __init__(self):
        self.name = self.backend
        if (reason := availability()[self.backend]) is not None:
            raise ImportError(reason)

    def version(self) -> str:
        return f"openmsa {package_version('openmsa')}"

    def select(self, x: Inputs) -> Tensor:
        layout = _Layout(x)
        return layout.unpack_blocks(self._select(x, layout).blocks)

    def _select(self, x: Inputs, layout: _Layout) -> Selection:
        return openmsa.select_blocks(
            layout.pack(x.q_index),
            layout.pack(x.k_index),
            block_size=x.rule.block_size,
            top_k=x.rule.top_k,
            local_blocks=x.rule.local_blocks,
            sink_blocks=x.rule.sink_blocks,
            index_scale=x.rule.index_scale,
            backend=self.backend,
            **layout.borders,
        )

    def attend(self, x: Inputs) -> tuple[Tensor, Tensor]:
        layout, how = _Layout(x), {"scale": x.rule.scale, "backend": self.backend}
        how |= layout.borders
        q, k, v = (layout.pack(y) for y in (x.q, x.k, x.v))
        if x.rule.phase == "warmup":
            found = openmsa.dense_attention(q, k, v, return_lse=True, **how)
        else:
            found = openmsa.sparse_attention(q, k, v, layout.selection(x), return_lse=True, **how)
        out, lse = (layout.unpack(y) for y in found)
        return out, lse

    def loss(self, x: Inputs) -> Tensor:
        layout = _Layout(x)
        weights = None if x.row_weights is None else layout.pack(x.row_weights)
        return openmsa.index_loss(
            *(layout.pack(y) for y in (x.q, x.k, x.q_index, x.k_index)),
            layout.selection(x),
            scale=x.rule.scale,
            index_scale=x.rule.index_scale,
            row_weights=weights,
            backend=self.backend,
            **layout.borders,
        )

    def open_cache(self, rule: Rule) -> Cache:
        return _Cache(self, rule)


class Reference(Ours):
    """The definition."""


class Portable(Ours):
    """torch, chunked."""

    backend = "portable"


class Cpu(Ours):
    """Native C++."""

    backend = "cpu"


class Triton(Ours):
    """NVIDIA and AMD."""

    backend = "triton"


class _Layout:
    """A padded batch becomes packed sequences, and back."""

    def __init__(self, x: Inputs):
        self.mask, self.queries, self.borders = x.mask, x.real_queries, {}
        if x.packed:
            self.borders = {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
        if x.mask is not None:
            for name, real in (("cu_seqlens_q", self.queries), ("cu_seqlens_k", self.mask)):
                borders = real.sum(1).cumsum(0, dtype=torch.int32)
                self.borders[name] = torch.nn.functional.pad(borders, (1, 0))

    def pack(self, y: Tensor) -> Tensor:
        """y [b, t, ...] or [b, s, ...]"""
        return y if self.mask is None else y[self.mask[:, -y.shape[1] :]][None]

    def unpack(self, y: Tensor) -> Tensor:
        if self.mask is None:
            return y
        whole = y.new_zeros(*self.queries.shape, *y.shape[2:])
        return whole.index_put(tuple(self.queries.nonzero().T), y[0])

    def unpack_blocks(self, blocks: Tensor) -> Tensor:
        return self.unpack(blocks.transpose(1, 2)).transpose(1, 2)

    def selection(self, x: Inputs) -> Selection | None:
        if x.rule.phase == "warmup":
            return None
        blocks = self.pack(x.blocks.transpose(1, 2)).transpose(1, 2).contiguous()
        return Selection(blocks, x.rule.block_size)


class _Cache(Cache):
    def __init__(self, engine: Ours, rule: Rule):
        try:
            from openmsa.hf.cache import MSACacheLayer
        except ModuleNotFoundError as error:
            raise NotOffered(f"a cache without the package {error.name}") from error
        self.engine, self.rule, self.layer = engine, rule, MSACacheLayer()
        self.mask = None

    @torch.no_grad()
    def append(self, x: Inputs) -> Tensor:
        self.layer.stage(x.k_index)
        k, v = self.layer.update(x.k.transpose(1, 2), x.v.transpose(1, 2))
        held = {"k": k.transpose(1, 2), "v": v.transpose(1, 2), "k_index": self.layer.take_index()}
        if x.mask is not None:
            self.mask = x.mask if self.mask is None else torch.cat([self.mask, x.mask], 1)
        x = x.replace(**held, mask=self.mask)
        x = x.replace(blocks=self.engine.select(x))
        return self.engine.attend(x)[0]

    def crop(self, length: int) -> None:
        self.layer.crop(length - self.layer.get_seq_length())

    def reorder(self, rows: tuple[int, ...]) -> None:
        self.layer.reorder_cache(torch.tensor(rows))

    def reload(self) -> None:
        self.layer = pickle.loads(pickle.dumps(self.layer))
