"""transformers' MiniMax-M3 after `openmsa.hf.enable`: its layer, attending by our operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmsa.conformance.adapter import Cache
from openmsa.conformance.adapters import package_version, transformers_m3
from openmsa.conformance.adapters.hidden import require
from openmsa.conformance.case import Inputs, Rule
from openmsa.hf.attention import NAME, LossRecord
from openmsa.hf.m3_classes import enable_class
from openmsa.hf.m3_room import rooms_of


class EnabledM3(transformers_m3.TransformersM3):
    """Selection, attention, index loss, gradients and cache."""

    name = "enabled-m3"

    def version(self) -> str:
        return f"openmsa {package_version('openmsa')}, {super().version()}"

    def layer(self, x: Inputs) -> _Layer:
        return _Layer(x)

    def select(self, x: Inputs) -> Tensor:
        layer = self._run(x)[0]
        blocks = layer.attention.msa_calls[-1].selection.blocks
        if x.mask is None:
            return blocks
        whole = blocks.new_zeros(*x.mask.shape, *blocks.shape[1::2])
        return whole.index_put(tuple(x.mask.nonzero().T), blocks[0].transpose(0, 1)).transpose(1, 2)

    def attend(self, x: Inputs) -> tuple[Tensor, None]:
        require(not x.imposed, "attention to blocks that are given")
        return self._run(x)[1], None

    def loss(self, x: Inputs) -> Tensor:
        require(x.row_weights is None or x.mask is not None, "weights of rows but padding's")
        require(x.rule.phase == "sparse", "a warm-up of one layer alone")
        return self._run(x)[2].losses[0]

    def _run(self, x: Inputs) -> tuple[_Layer, Tensor, LossRecord]:
        layer = self.layer(x)
        hidden, cache = layer.after_prefix(x)
        layer.attention.msa_calls, record = [], LossRecord()
        layer.give(x, x.k.shape[1] - x.q.shape[1])
        out = layer.run(hidden, cache, layer.positions(x), x.mask, msa_record=record)
        return layer, out, record

    def open_cache(self, rule: Rule) -> Cache:
        return _Session(self)


class _Layer(transformers_m3.Layer):
    """The index comes from tensors that are given: the layer reads hidden vectors detached."""

    def __init__(self, x: Inputs):
        super().__init__(x)
        self.config._attn_implementation = NAME
        self.attention.msa_room = rooms_of(self.config)[0]
        enable_class(self.attention)
        if not self.sparse:
            self.attention.msa_phase = "dense"
            return
        enable_class(self.attention.indexer)
        self.attention.indexer.q_proj, self.attention.indexer.k_proj = _Given(), _Given()

    def give(self, x: Inputs, start: int, stop: int | None = None) -> None:
        """Index queries and keys of the next run: those of tokens start ... stop."""
        if self.sparse:
            queries = x.q_index.flatten(2)
            if stop is not None:
                queries = queries.new_zeros(queries.shape[0], stop - start, queries.shape[2])
            self.attention.indexer.q_proj.tensor = queries
            self.attention.indexer.k_proj.tensor = x.k_index[:, start:stop]

    def before_prefix(self, x: Inputs, before: int) -> None:
        self.give(x, 0, before)


class _Given(nn.Module):
    tensor: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.tensor


class _Session(transformers_m3.Session):
    def __init__(self, engine: EnabledM3):
        super().__init__()
        self.engine = engine

    @torch.no_grad()
    def append(self, x: Inputs) -> Tensor:
        layer = self.engine.layer(x)
        layer.give(x, 0)
        return self.grow(layer, x)
