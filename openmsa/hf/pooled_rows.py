"""What a mechanism makes of whole windows of tokens, kept beside a layer's keys and values.

A window never changes once its last token is there, so each is made once, when it is first asked
for. Nobody outside holds these rows beyond the attention of one step, so they are written in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openmsa.hf.room import Room
from openmsa.ops.pooled_selection import num_windows


class PooledRows:
    """By name [b, g, n, ...] for the windows of `room`, made of keys that a cache holds.

    Window j of a batch row begins stride * j slots behind the row's first real token. Rows may
    begin in different slots and hold different numbers of windows.
    """

    def __init__(self, room: Room, batch: int):
        self.room = room
        self._rows: dict[str, Tensor] = {}
        self._marks = [(0, 0)] * batch  # per batch row: first slot, windows made

    @property
    def batch(self) -> int:
        """Batch rows."""
        return len(self._marks)

    def of(
        self,
        keys: dict[str, Tensor],
        rows: slice,
        first: int,
        make: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Every whole window of these batch rows, [b, n, g, ...]; `make` pools those not yet there.

        keys: by name [b, s, ...] of the batch rows `rows`, from slot `first` on.
        """
        kernel, stride = self.room.windows
        k = keys["k"]
        if any((x.dtype, x.device) != (k.dtype, k.device) for x in self._rows.values()):
            self._rows, self._marks = {}, [(0, 0)] * self.batch
        wanted = num_windows(k.shape[1], kernel, stride)
        marks = self._marks[rows]
        made = min((count if begin == first else 0 for begin, count in marks), default=wanted)
        if made < wanted or not self._rows:
            new = slice(made * stride, (wanted - 1) * stride + kernel if wanted else 0)
            for name, x in make({name: x[:, new] for name, x in keys.items()}).items():
                self._append(name, x.transpose(1, 2), rows, made)
            self._marks[rows] = [(first, wanted)] * len(marks)
        return {name: x[rows, :, :wanted].transpose(1, 2) for name, x in self._rows.items()}

    def _append(self, name: str, new: Tensor, rows: slice, made: int) -> None:
        """Write new [b, g, n, ...] behind the windows `made` of some batch rows."""
        held, grown = self._rows.get(name), made + new.shape[2]
        if held is None or not _may_write(held, grown):
            before = 0 if held is None else held.shape[2]
            room = max(before, grown + max(16, grown // 4))
            bigger = new.new_empty(self.batch, new.shape[1], room, *new.shape[3:])
            if held is not None:
                bigger[:, :, :before] = held
            held = self._rows[name] = bigger
        held[rows, :, made:grown] = new

    def crop(self, num_tokens: int) -> None:
        """Forget the windows that are not whole within the first num_tokens slots."""
        self._marks = [
            (first, min(count, num_windows(num_tokens - first, *self.room.windows)))
            for first, count in self._marks
        ]

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Take the rows to another device."""
        self._rows = {name: change(x) for name, x in self._rows.items()}

    def choose(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        """Choose, repeat or reorder batch rows; `batch` of them come out."""
        self.move(change)
        if len(set(self._marks)) > 1:
            order = change(torch.arange(self.batch, device="cpu")).tolist()
            self._marks = [self._marks[row] for row in order]
        else:
            self._marks = self._marks[:1] * batch


def _may_write(held: Tensor, grown: int) -> bool:
    return grown <= held.shape[2] and (not held.is_inference() or torch.is_inference_mode_enabled())
