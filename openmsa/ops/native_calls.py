"""From tensors to what `openmsa.native` takes: addresses, sizes and strides, nothing copied.

Every tensor whose address is passed must live until the call returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmsa import native

_KIND = {getattr(torch, name): number for number, name in enumerate(native.KINDS)}
DTYPES = tuple(_KIND)

# Below this many multiply-adds, waking a second thread costs more than it saves.
_ONE_THREAD = 1 << 20


def threads(multiply_adds: int) -> int:
    """How many threads for that much work: one, or as many as torch uses."""
    return 1 if multiply_adds < _ONE_THREAD else torch.get_num_threads()


def view(x: Tensor) -> tuple:
    """A tensor of four axes, of any strides."""
    return x.data_ptr(), x.shape, x.stride(), _KIND[x.dtype]


def blocks_of(blocks: Tensor | None) -> tuple | None:
    """Block numbers int32 [b, groups, t, k], of any strides."""
    return None if blocks is None else (blocks.data_ptr(), blocks.shape, blocks.stride())


def borders_of(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple | None:
    """The borders of packed sequences; the last two entries only keep their memory alive."""
    if cu_seqlens_q is None:
        return None
    q, k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return q.data_ptr(), k.data_ptr(), q.shape[0] - 1, q, k


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    block_size: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks, or without blocks over everything visible."""
    out, lse = empty_attention(q, v)
    native.attend(
        threads(_pairs(q, k, blocks, block_size) * (q.shape[3] + v.shape[3])),
        *(view(q), view(k), view(v), blocks_of(blocks), block_size, scale),
        *(view(out), lse.data_ptr(), borders_of(cu_seqlens_q, cu_seqlens_k)),
    )
    return out, lse


def empty_attention(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [b, t, h, dv] and lse [b, t, h], not yet computed."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, in the dtypes of q, k, v."""
    dq, dk, dv = empty_gradients(q, k, v)
    lse = lse.contiguous()
    native.attend_backward(
        threads(_pairs(q, k, blocks, block_size) * (q.shape[3] + v.shape[3])),
        *(view(q), view(k), view(v), blocks_of(blocks), block_size, scale),
        *(view(out), view(dout), lse.data_ptr()),
        *(view(dq), view(dk), view(dv), borders_of(cu_seqlens_q, cu_seqlens_k)),
    )
    return dq, dk, dv


def empty_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of these shapes, not yet computed."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def _pairs(q: Tensor, k: Tensor, blocks: Tensor | None, block_size: int) -> int:
    """At most so many pairs of a query head and a key."""
    s = k.shape[1]
    return (
        q.shape[0]
        * q.shape[1]
        * q.shape[2]
        * (s if blocks is None else min(s, blocks.shape[3] * block_size))
    )
