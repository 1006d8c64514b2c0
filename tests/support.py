"""What tests of several rooms share: backends, seeded inputs, eager torch, the accuracy rule."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from openmsa.native import EVERY_INSTRUCTION_SET

# Each is one run of a test's body; those that cannot run here are skipped (tests/conftest.py).
CPU = [f"cpu-{name}" for name in EVERY_INSTRUCTION_SET]
JUDGED = ["portable", *CPU, "triton"]
every_backend = pytest.mark.parametrize("backend", ["reference", *JUDGED], indirect=True)
judged_backend = pytest.mark.parametrize("backend", JUDGED, indirect=True)
every_instruction_set = pytest.mark.parametrize("backend", CPU, indirect=True)


def widest(backend: str) -> torch.dtype:
    """The most precise dtype that a backend takes."""
    return torch.float32 if backend in ("cpu", "triton") else torch.float64


def gradcheck(run, inputs) -> bool:
    """torch's, with steps and tolerances for fp32 where the inputs are fp32."""
    if inputs[0].dtype == torch.float64:
        return torch.autograd.gradcheck(run, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not a double precision floating point.*")
        return torch.autograd.gradcheck(run, inputs, eps=1e-2, atol=2e-3, rtol=1e-2)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False):
    """A normal tensor that depends on its seed only, not on the device; rounded to `dtype`.

    It lies where new tensors do: on the GPU in a test whose backend runs there (tests/conftest.py).
    """
    drawn = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    x = torch.randn(*shape, **drawn, dtype=torch.float64)
    return x.to(torch.get_default_device(), dtype).requires_grad_(grad)


def qkv(b, t, s, h, g, d, dv=None, *, seed=0, dtype=torch.float32, grad=False):
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, dv]"""
    return (
        seeded(b, t, h, d, seed=seed, dtype=dtype, grad=grad),
        seeded(b, s, g, d, seed=seed + 1, dtype=dtype, grad=grad),
        seeded(b, s, g, dv or d, seed=seed + 2, dtype=dtype, grad=grad),
    )


def index_qk(b, t, s, g, d_index, *, seed=10, dtype=torch.float32, grad=False):
    """q_index [b, t, g, d_index], k_index [b, s, d_index]"""
    return (
        seeded(b, t, g, d_index, seed=seed, dtype=dtype, grad=grad),
        seeded(b, s, d_index, seed=seed + 1, dtype=dtype, grad=grad),
    )


def borders(*lengths: int) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def readable(t: int, s: int, blocks: Tensor | None, block_size: int) -> Tensor:
    """Which keys a query may read, written once more with loops: bool [b, groups, t, s]."""
    causal = torch.ones(s, s, dtype=torch.bool).tril()[s - t :]
    if blocks is None:
        return causal[None, None]
    chosen = torch.zeros(*blocks.shape[:3], s, dtype=torch.bool)
    for b, g, i, slot in torch.cartesian_prod(*map(torch.arange, blocks.shape)).tolist():
        start = int(blocks[b, g, i, slot]) * block_size
        if 0 <= start < s:
            chosen[b, g, i, start : start + block_size] = True
    return chosen & causal


def eager_attention(q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float) -> Tensor:
    """What eager torch computes in the dtype of q: masked scores, softmax, values."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    read = read.repeat_interleave(q.shape[2] // read.shape[1], 1)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * scale
    weights = scores.masked_fill(~read, -math.inf).softmax(-1)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def eager_loss(q, k, q_index, k_index, read, scale, index_scale) -> Tensor:
    """What eager torch computes for the index loss in the dtype of its inputs."""
    g = k.shape[2]
    heads = k.repeat_interleave(q.shape[2] // g, 2).permute(0, 2, 3, 1)
    scores = (q.transpose(1, 2) @ heads) * scale
    hidden = ~read.expand(-1, g, -1, -1).repeat_interleave(q.shape[2] // g, 1)
    teacher = scores.masked_fill(hidden, -math.inf).softmax(-1).unflatten(1, (g, -1)).mean(2)
    student = (q_index.transpose(1, 2) @ k_index.mT[:, None]) * index_scale
    student = student.masked_fill(~read, -math.inf).log_softmax(-1).masked_fill(~read, 0)
    teacher = teacher.detach()
    return (torch.xlogy(teacher, teacher) - teacher * student).sum(-1).mean()


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, truth: Tensor, what: str = "") -> None:
    """Mean and largest error against fp64 at most twice eager's.

    The largest error, and the only error of a single number, may be one last place more: eager is
    at times exactly right by luck.
    """
    last_place = torch.finfo(ours.dtype).eps * truth.abs().max()
    error, allowed = ((x.double() - truth).abs() for x in (ours, eager))
    assert not error.isnan().any(), f"{what}: NaN"
    assert error.max() <= 2 * allowed.max() + last_place, (
        f"{what}: largest error {error.max():.2e}, eager {allowed.max():.2e}"
    )
    assert error.numel() == 1 or error.mean() <= 2 * allowed.mean(), (
        f"{what}: mean error {error.mean():.2e}, eager {allowed.mean():.2e}"
    )
