"""Where the real tokens of a padded or packed batch stand, found once per forward pass.

Blocks are counted from the first real token of a sequence, so padding is taken out before attention
and put back after it: [b, t, ...] becomes one packed row [1, total, ...] with cu_seqlens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Batch rows whose real tokens are one run of slots each, at the same place."""

    rows: slice
    queries: slice
    keys: slice


@dataclass(frozen=True)
class Layout:
    """Real tokens of a batch of t query slots and s key slots per row.

    query_slots, key_slots: their places in the flattened [b * t] and [b * s], None where every slot
    is real. cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1]. spans: the same without moving
    anything, if the real tokens of every row are one run (not packed, no holes). longest: tokens of
    the longest sequence.
    """

    query_slots: Tensor | None
    key_slots: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    spans: tuple[Span, ...] | None
    num_queries: int
    longest: int


def find_layout(
    *,
    batch: int,
    num_queries: int,
    num_cached: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Layout | None:
    """The layout of a batch, None if every row is one whole sequence.

    Packed sequences are recognised as transformers does: by cu_seqlens, or by position_ids that do
    not count on from one slot to the next, in a batch without a mask and without a filled cache.
    Raises ValueError for masks that are not [batch, cached + new tokens] and for packed sequences
    with a cache.
    """
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(
            "attention_mask must be a tensor [batch, tokens], got "
            f"{type(attention_mask).__name__}: masks prepared for a static or compiled cache are "
            "not supported; use DynamicCache"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be [batch, tokens] with 0 for padding, got shape "
            f"{tuple(attention_mask.shape)}: a custom mask cannot be followed by block selection; "
            "mark packed sequences by position_ids"
        )
    if cu_seqlens is not None:
        return _from_borders(cu_seqlens, batch, num_queries, num_cached, attention_mask)
    if attention_mask is not None:
        tokens = num_cached + num_queries
        if tuple(attention_mask.shape) != (batch, tokens):
            raise ValueError(
                f"attention_mask must be [{batch}, {tokens}] here ({num_cached} cached and "
                f"{num_queries} new tokens), got {tuple(attention_mask.shape)}"
            )
        return None if bool(attention_mask.all()) else _padded(attention_mask.bool(), num_queries)
    if position_ids is not None and num_cached == 0 and num_queries > 1:
        return _from_positions(position_ids.expand(batch, -1))
    return None


def _padded(real: Tensor, num_queries: int) -> Layout:
    """real: bool [b, s]; the queries are the last slots of every row."""
    asked = real[:, real.shape[1] - num_queries :]
    keys, queries = real.sum(1), asked.sum(1)
    places = torch.arange(real.shape[1], device=real.device)
    first = torch.where(real, places, real.shape[1]).amin(1)
    last = torch.where(real, places, -1).amax(1)
    rows = torch.stack([keys, queries, first, last + 1], 1).tolist()
    holes = any(count and end - start != count for count, _, start, end in rows)
    return Layout(
        query_slots=asked.flatten().nonzero().squeeze(1),
        key_slots=real.flatten().nonzero().squeeze(1),
        cu_seqlens_q=_borders(queries),
        cu_seqlens_k=_borders(keys),
        spans=None if holes else tuple(_spans(rows, real.shape[1] - num_queries)),
        num_queries=sum(row[1] for row in rows),
        longest=max(row[0] for row in rows),
    )


def _spans(rows: list[list[int]], num_cached: int):
    """One span for a run of rows with their tokens in the same slots, such as beams."""
    number = 0
    for (keys, queries, first, end), same in groupby(rows):
        size = len(list(same))
        if queries:
            asked = slice(end - queries - num_cached, end - num_cached)
            yield Span(slice(number, number + size), asked, slice(first, first + keys))
        number += size


def _from_positions(position_ids: Tensor) -> Layout | None:
    """A sequence starts at every row and wherever a position does not follow the one before."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff() != 1
    places = starts.flatten().nonzero().squeeze(1)
    if places.shape[0] == position_ids.shape[0]:
        return None
    end = places.new_full((1,), position_ids.numel())
    return _packed(torch.cat([places, end]).to(torch.int32))


def _from_borders(cu_seqlens, batch, num_queries, num_cached, attention_mask) -> Layout:
    if num_cached:
        raise ValueError(
            "cu_seq_lens_q marks packed sequences, which cannot continue a cache; leave the cache "
            "out, or pass a batch with an attention_mask"
        )
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q needs batch 1 (one packed row), got batch {batch}")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("cu_seq_lens_q and an attention_mask with padding contradict each other")
    borders = cu_seqlens.to(torch.int32)
    if borders.dim() != 1 or borders.shape[0] < 2 or int(borders[-1]) != num_queries:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {num_queries} tokens of the batch, got "
            f"{borders.tolist()}"
        )
    return _packed(borders)


def _packed(borders: Tensor) -> Layout:
    return Layout(
        query_slots=None,
        key_slots=None,
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        spans=None,
        num_queries=int(borders[-1]),
        longest=int(borders.diff().max()),
    )


def _borders(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def pack(x: Tensor, slots: Tensor | None) -> Tensor:
    """[b, n, ...] -> [1, total, ...], the real tokens in order."""
    flat = x.flatten(0, 1)
    return (flat if slots is None else flat.index_select(0, slots.to(x.device)))[None]


def unpack(x: Tensor, slots: Tensor | None, batch: int, num_tokens: int) -> Tensor:
    """[1, total, ...] -> [b, n, ...], zeros where there is no real token."""
    if slots is not None:
        empty = x.new_zeros(batch * num_tokens, *x.shape[2:])
        return empty.index_copy(0, slots.to(x.device), x[0]).unflatten(0, (batch, num_tokens))
    return x[0].unflatten(0, (batch, num_tokens))
