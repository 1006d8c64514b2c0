"""How much an operation has to do: only what its result needs is counted, a multiply-add as two.

pairs            (query token, key) pairs of one head or group; a masked key is no pair
select           2 d_index                   a pair and group: one dot product with the index key
attend           2 (d + d_value)             a pair and head:  q . k, then p v
attend backward  2 (3 d + 2 d_value)         a pair and head:  q . k again, dout . v, dq, dk, dv
index loss       2 (d r + 3 d_index)         a pair and group: the teacher's r heads, the student's
                                             scores and its two gradients
decode           bytes of every visible index key and of the visible selected keys and values
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa.selection import Selection


def causal_pairs(t: int, s: int) -> int:
    """Pairs of the last t of s tokens with the keys up to each."""
    if not 0 <= t <= s:
        raise ValueError(f"t={t} queries are the last of s={s} keys; give 0 <= t <= s")
    return t * s - t * (t - 1) // 2


def packed_causal_pairs(query_lens: list[int], key_lens: list[int]) -> int:
    """`causal_pairs` summed over packed sequences."""
    return sum(causal_pairs(t, s) for t, s in zip(query_lens, key_lens, strict=True))


def selected_pairs(
    selection: Selection,
    num_keys: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> int:
    """Visible keys of the selected blocks, summed over batch, groups of the selection and tokens.

    A block named twice, in the future or outside the sequence adds nothing.
    """
    blocks, size = selection.blocks, selection.block_size
    t = blocks.shape[2]
    if cu_seqlens_q is None:
        position = torch.arange(num_keys - t, num_keys)
    else:
        of = torch.searchsorted(cu_seqlens_q[1:].contiguous(), torch.arange(t), right=True)
        before = cu_seqlens_k.diff() - cu_seqlens_q.diff() - cu_seqlens_q[:-1]
        position = before[of] + torch.arange(t)
    total = 0
    # A piece of the tokens at a time: this runs beside measurements and should not need gigabytes.
    for start in range(0, t, 4096):
        piece = blocks[:, :, start : start + 4096].long().sort(-1).values
        last = position[start : start + 4096, None]
        seen = (last + 1 - piece * size).clamp(0, size)
        again = torch.zeros_like(piece, dtype=torch.bool)
        again[..., 1:] = piece[..., 1:] == piece[..., :-1]
        total += int(seen.masked_fill(again | (piece < 0), 0).sum())
    return total


def select_flops(pairs: int, g: int, d_index: int) -> int:
    """pairs: visible (query token, key) pairs, whatever the group."""
    return 2 * d_index * g * pairs


def attend_flops(pairs: int, r: int, d: int, d_value: int) -> int:
    """pairs: summed over groups; r heads share each."""
    return 2 * (d + d_value) * r * pairs


def attend_backward_flops(pairs: int, r: int, d: int, d_value: int) -> int:
    """pairs: summed over groups; r heads share each."""
    return 2 * (3 * d + 2 * d_value) * r * pairs


def index_loss_flops(pairs: int, r: int, d: int, d_index: int) -> int:
    """Value and gradients. pairs: summed over groups; r heads share each."""
    return 2 * (d * r + 3 * d_index) * pairs


def decode_bytes(
    index_keys: int, pairs: int, *, d_index: int, d: int, d_value: int, element_bytes: int
) -> int:
    """What choosing and attending must read. pairs: summed over groups, with one query token."""
    return element_bytes * (index_keys * d_index + pairs * (d + d_value))


def dense_decode_bytes(keys: int, g: int, *, d: int, d_value: int, element_bytes: int) -> int:
    """What one query token of dense attention must read."""
    return element_bytes * keys * g * (d + d_value)
