"""torch's own fused attention, forward, where it fits. Shapes, dtype and chip alone decide:

    cuDNN   Hopper and newer; as many queries as keys; d up to 128; not packed
    flash   Ampere and newer; d up to 256; packed as well
    ours    the rest: fp32, AMD, d not a multiple of 8, d_value other than d, the interpreter

The causal mask of cuDNN begins at the upper left corner, so it serves where both corners are the
same; that of flash ends at the lower right, as our definition does. The backward pass is always
ours: flash's adds dq in any order, or in a fixed one with partial sums as large as several q.

Neither kernel keeps a value that is not finite from queries that do not see it (0 * NaN). So keys
and values go in with such tokens zeroed, and the queries that see one are told afterwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmsa.ops.gpu import Gpu
from openmsa.ops.triton_tiles import Places

CUDNN_WIDTH, FLASH_WIDTH = 128, 256
CUDNN_CAPABILITY, FLASH_CAPABILITY = 90, 80


def kernel_for(
    q: Tensor, k: Tensor, v: Tensor, *, packed: bool, gpu: Gpu, interpreted: bool = False
) -> str | None:
    """ "cudnn", "flash" or None, which is ours; q [b, t, h, d], k [b, s, g, d], v [b, s, g, dv]."""
    t, s, d, dv = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not half or interpreted or gpu.hip or d != dv or d % 8 or gpu.capability < FLASH_CAPABILITY:
        return None
    if t == s and not packed and d <= CUDNN_WIDTH and gpu.capability >= CUDNN_CAPABILITY:
        return "cudnn"
    return "flash" if d <= FLASH_WIDTH else None


def forward(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out [b, t, h, dv], lse [b, t, h]: the natural logarithm, fp32, as ours."""
    if q.shape[1] == 1:  # nothing comes after a single query
        return _run(kernel, q, k, v, scale, cu_seqlens_q, cu_seqlens_k)
    spoilt = ~(k.sum(-1, dtype=torch.float32) + v.sum(-1, dtype=torch.float32)).isfinite()
    k, v = (x.masked_fill(spoilt[..., None], 0) for x in (k, v))
    out, lse = _run(kernel, q, k, v, scale, cu_seqlens_q, cu_seqlens_k)
    told = torch.where(_sees(spoilt, places), math.nan, 0.0)
    g = k.shape[2]
    out.unflatten(2, (g, -1)).add_(told[..., None, None])
    lse.unflatten(2, (g, -1)).add_(told[..., None])
    return out, lse


def _run(kernel, q, k, v, scale, cu_seqlens_q, cu_seqlens_k) -> tuple[Tensor, Tensor]:
    if kernel == "cudnn":
        return _cudnn(q, k, v, scale)
    return _flash(q, k, v, scale, cu_seqlens_q, cu_seqlens_k)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    parts = (x.transpose(1, 2) for x in (q, k, v))
    run = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = run(*parts, None, True, 0.0, q.shape[1] > 1, False, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.view(lse.shape[:3]).transpose(1, 2).contiguous()


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Packed: the longest sequence is not known without waiting; that of all tokens is a bound."""
    t, s = q.shape[1], k.shape[1]
    if cu_seqlens_q is not None:
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        cu_seqlens_q, cu_seqlens_k = (x.to(torch.int32) for x in (cu_seqlens_q, cu_seqlens_k))
    run = torch.ops.aten._flash_attention_forward
    out, lse, *_ = run(q, k, v, cu_seqlens_q, cu_seqlens_k, t, s, 0.0, True, False, scale=scale)
    if cu_seqlens_q is not None:
        out, lse = out[None], lse[None]
    return out, lse[..., :t].transpose(1, 2).contiguous()


def _sees(spoilt: Tensor, places: Places) -> Tensor:
    """Which queries see a spoilt key: bool [b, t, g] from [b, s, g]."""
    upto = torch.nn.functional.pad(spoilt.cumsum(1), (0, 0, 1, 0))
    return upto[:, places.position + 1] > upto[:, places.start]
