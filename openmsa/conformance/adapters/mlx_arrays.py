"""Between torch and MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

DTYPES = {
    torch.float32: mx.float32,
    torch.float16: mx.float16,
    torch.bfloat16: mx.bfloat16,
    torch.float64: mx.float64,
}


def to_mlx(x: Tensor) -> mx.array:
    """The same numbers; bfloat16 goes through float32, which holds it exactly."""
    if not x.is_floating_point():
        return mx.array(x.cpu().numpy())
    wide = x.detach().cpu().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return mx.array(wide.numpy(), dtype=DTYPES[x.dtype])


def to_torch(x: mx.array) -> Tensor:
    """A tensor on the CPU, floating-point ones in float32 or wider."""
    if x.dtype in (mx.float16, mx.bfloat16):
        x = x.astype(mx.float32)
    return torch.from_numpy(np.array(x))
