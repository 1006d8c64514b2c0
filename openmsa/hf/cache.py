"""The cache of a converted layer: keys and values, and beside them index keys and what is made of
whole windows where there are any, through every operation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from openmsa.hf.pooled_rows import PooledRows
from openmsa.hf.room import Room

NAMES = ("keys", "values", "index_keys")


def msa_cache_layer(cache: Cache, layer: int, with_index: bool = True) -> MSACacheLayer:
    """The layer of `cache` for a converted layer of the model; with_index: it keeps index keys.

    A layer of a DynamicCache is exchanged for ours: an empty one, or, without an index, one that
    a dense model has filled.
    Raises ValueError for any other kind of cache, and for one whose index keys are missing or
    nobody's.
    """
    remedy = "pass DynamicCache(), or leave the cache out"
    if not isinstance(cache, Cache):
        raise ValueError(
            f"a converted model needs a DynamicCache, got {type(cache).__name__}; {remedy}"
        )
    make = getattr(cache, "layer_class_to_replicate", None)
    while make is not None and len(cache.layers) <= layer:
        cache.layers.append(make())
    found = cache.layers[layer] if layer < len(cache.layers) else None
    if isinstance(found, MSACacheLayer) and found.with_index == with_index:
        return found
    if type(found) not in (DynamicLayer, MSACacheLayer):
        kind = f"{type(cache).__name__} with {type(found).__name__}"
        what = "index keys, which" if with_index else "all keys in their order, which"
        raise ValueError(f"layer {layer} is sparse and keeps {what} {kind} cannot hold; {remedy}")
    if found.get_seq_length() > 0 and (with_index or isinstance(found, MSACacheLayer)):
        what = "but no index keys" if with_index else "and index keys that would be lost"
        raise ValueError(
            f"the cache holds {found.get_seq_length()} tokens {what} for layer {layer}: "
            f"another model filled it; {remedy} and run the converted model on the whole prompt"
        )
    cache.layers[layer] = MSACacheLayer(with_index=with_index)
    if found.get_seq_length() > 0:
        cache.layers[layer].adopt(found)
    return cache.layers[layer]


class MSACacheLayer(DynamicLayer):
    """Keys, values [b, g, s, d] and, with_index, index_keys [b, s, d_index] of one layer.

    They are views of the first s rows of larger buffers, so appending a token writes a token.
    A row that was read through one of these names is never written again: whoever holds it keeps
    what was read.
    """

    def __init__(self, *, with_index: bool = True, **kwargs):
        self.with_index = with_index
        self._rows: dict[str, Tensor] = {}
        self._length = 0
        self._exposed = 0  # rows that an outside reader may still hold
        self._staged: Tensor | None = None
        self._handed: Tensor | None = None
        self._pooled: PooledRows | None = None
        super().__init__(**kwargs)

    def adopt(self, filled: DynamicLayer) -> None:
        """Go on where a dense model's layer stopped."""
        self.lazy_initialization(filled.keys, filled.values)
        self.keys, self.values = filled.keys, filled.values

    def _read(self, name: str) -> Tensor | None:
        self.expose()
        return self._view(name)

    def _store(self, name: str, rows: Tensor | None) -> None:
        """Rows without room to spare, assigned by a method of the base class we do not know."""
        self._rows.pop(name, None)
        self._pooled = None
        if rows is not None:
            self._rows[name] = rows
            self._length = self._exposed = rows.shape[-2]

    keys = property(lambda self: self._read("keys"), lambda self, rows: self._store("keys", rows))
    values = property(
        lambda self: self._read("values"), lambda self, rows: self._store("values", rows)
    )
    index_keys = property(lambda self: self._read("index_keys"))

    def expose(self) -> None:
        """From here on somebody outside may hold views of the rows."""
        self._exposed = max(self._exposed, self._length)

    def stage(self, index_keys: Tensor | None) -> None:
        """Index keys [b, t, d_index], if any, of the tokens that the next `update` brings."""
        self._staged = index_keys

    def take_index(self) -> Tensor | None:
        """All index keys [b, s, d_index] after `update`; once, for the attention of this step."""
        handed, self._handed = self._handed, None
        return handed

    def pooled(
        self, room: Room, attention: nn.Module, keys: dict[str, Tensor], rows: slice, first: int
    ) -> dict[str, Tensor]:
        """What `room` pools of every whole window of some batch rows, by name [b, n, g, ...].

        keys: those held of the batch rows `rows` from slot `first` on, by name [b, s, ...]. A
        window is pooled once; without gradient.
        """
        batch = self._rows["keys"].shape[0]
        if self._pooled is None or (self._pooled.room, self._pooled.batch) != (room, batch):
            self._pooled = PooledRows(room, batch)
        return self._pooled.of(keys, rows, first, partial(room.pool, attention))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, g, t, d] with the staged index keys; all keys and values come
        back.

        Raises ValueError if no index keys were staged: a dense model uses a converted model's
        cache.
        """
        index_keys, self._staged = self._staged, None
        if index_keys is None and self.with_index:
            raise ValueError(
                "this cache belongs to a converted model and expects index keys, but none came "
                "with the new keys; give every model a cache of its own"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for name, rows in zip(NAMES, (key_states, value_states, index_keys), strict=True):
            if rows is not None:
                self._append(name, rows)
        self._exposed = min(self._exposed, self._length)
        self._length += key_states.shape[-2]
        if torch.is_grad_enabled():
            self.expose()  # a graph may hold the rows
        self._handed = self._view("index_keys")
        return self._view("keys"), self._view("values")

    def _append(self, name: str, new: Tensor) -> None:
        rows, length = self._rows.get(name), self._length
        grown = length + new.shape[-2]
        if rows is not None and rows.shape[:-2] != new.shape[:-2]:
            raise ValueError(
                f"the cache holds {name} of shape {tuple(self._view(name).shape)}, the new ones "
                f"are {tuple(new.shape)}: only the number of tokens may differ"
            )
        if torch.is_grad_enabled() or (rows is not None and rows.dtype != new.dtype):
            self._rows[name] = new if rows is None else torch.cat([rows[..., :length, :], new], -2)
            return
        if rows is None or not self._may_write(rows, grown):
            room = grown + max(64, grown // 4)
            bigger = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            if rows is not None:
                bigger[..., :length, :] = rows[..., :length, :]
            rows = self._rows[name] = bigger
        rows[..., length:grown, :] = new

    def _may_write(self, rows: Tensor, grown: int) -> bool:
        return (
            grown <= rows.shape[-2]
            and self._length >= self._exposed
            and not rows.requires_grad
            and (not rows.is_inference() or torch.is_inference_mode_enabled())
        )

    def _view(self, name: str) -> Tensor | None:
        rows = self._rows.get(name)
        return None if rows is None else rows[..., : self._length, :]

    def _change(self, change) -> None:
        changed = {name: change(rows) for name, rows in self._rows.items()}
        if any(changed[name] is not rows for name, rows in self._rows.items()):
            self._rows, self._exposed = changed, 0

    def _choose(self, change) -> None:
        """Other batch rows."""
        self._change(change)
        if self._pooled is not None:
            self._pooled.choose(change, self._rows["keys"].shape[0])

    def _move(self, change) -> None:
        """The same rows on another device."""
        self._change(change)
        if self._pooled is not None:
            self._pooled.move(change)

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last |tokens_to_remove| tokens; the number is negative or 0.

        Raises ValueError for a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} must be negative or 0; use "
                f"-{tokens_to_remove} to forget that many"
            )
        self._length = max(0, self._length + tokens_to_remove)
        if self._pooled is not None:
            self._pooled.crop(self._length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        def at(device):
            return indices.to(device) if isinstance(indices, Tensor) else indices

        self._choose(lambda rows: rows[at(rows.device), ...])

    def offload(self) -> None:
        self._move(lambda rows: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(lambda rows: rows.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self._rows, self._length, self._exposed = {}, 0, 0
        self._staged = self._handed = self._pooled = None
        self.is_initialized = False
