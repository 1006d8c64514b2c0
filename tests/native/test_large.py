"""More than 2^31 elements: places in memory are 64-bit numbers."""

from __future__ import annotations

import pytest
import torch

from openmsa import Selection, select_blocks, sparse_attention
from tests.native.workload import differing, everything
from tests.support import every_instruction_set, index_qk, qkv, seeded


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """x with its tokens so far apart that the last lies past 2^31 elements.

    The memory between them is asked for but never touched, so it costs nothing.
    """
    b, t, *rest = x.shape
    step = 2**31 // ((t - 1) * b) + 64
    room = x.new_empty(b * t * step)
    strides, size = [], 1
    for n in reversed(rest):
        strides.insert(0, size)
        size *= n
    return room.as_strided(x.shape, (t * step, step, *strides)).copy_(x)


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_past_two_to_the_31(backend, dtype):
    tensors = (*qkv(2, 20, 20, 4, 2, 16, dtype=dtype), *index_qk(2, 20, 20, 2, 16, dtype=dtype))
    rule = {"block_size": 4, "top_k": 2}
    near = everything(tensors, **rule, dout=seeded(2, 20, 4, 16, seed=9, dtype=dtype))
    dout = far_apart(seeded(2, 20, 4, 16, seed=9, dtype=dtype))
    far = everything(tuple(far_apart(x) for x in tensors), **rule, dout=dout)
    assert differing(near, far) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_outputs_and_keys_past_two_to_the_31(backend):
    """out, dq, dk and k_index with more than 2^31 elements each, 4.3 GB at a time."""
    d, s = 256, (1 << 23) + 40
    last = (s - 1) // 16
    blocks = torch.arange(s, dtype=torch.int32).div_(16, rounding_mode="floor").view(1, 1, s, 1)
    own = Selection(blocks, 16)
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)

    def wide(n):
        return one.expand(1, s, 1, n)

    v = wide(d).detach()
    out = sparse_attention(wide(8), wide(8), v, own, backend=backend)
    assert out.numel() > 2**31
    assert (out[0, -100:] == 1).all()
    assert out[0, :: 1 << 16].float().mean() == 1
    del out

    q, k = wide(d).detach().requires_grad_(), wide(d).detach().requires_grad_()
    out = sparse_attention(q, k, wide(8), own, backend=backend)
    (dq,) = torch.autograd.grad(out, q, wide(8))
    assert dq.numel() > 2**31
    assert (dq[0, -100:] == 0).all()
    del dq, out

    k_index = torch.zeros(1, s, d, dtype=torch.bfloat16)
    k_index[0, -3] = 1
    k_index[0, 5] = 2
    q_index = torch.ones(1, 1, 1, d, dtype=torch.bfloat16)
    rule = {"block_size": 16, "top_k": 3, "backend": backend}
    assert select_blocks(q_index, k_index, **rule).blocks.tolist() == [[[[0, 1, last]]]]
