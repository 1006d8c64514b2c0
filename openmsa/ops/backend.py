"""Backends: asked for by name or chosen by device and dtype, never swapped silently."""

from __future__ import annotations

import torch

from openmsa import native
from openmsa.ops.native_calls import DTYPES

BACKENDS = ("reference", "portable", "cpu", "triton")


def availability() -> dict[str, str | None]:
    """Every backend's name, with None if it is usable here and the reason if it is not."""
    return {
        "reference": None,
        "portable": None,
        "cpu": native.unavailable(),
        "triton": "the Triton kernels are not part of this version",
    }


def choose(backend: str | None, device: torch.device | str, *dtypes: torch.dtype) -> str:
    """The backend for tensors of `dtypes` on `device`: the one asked for; if None, the fastest
    usable one.

    Raises ValueError for an unknown name and for a backend that is not usable here.
    """
    if backend is None:
        served = native.unavailable() is None and _why_not_cpu(device, dtypes) is None
        return "cpu" if served and torch.device(device).type == "cpu" else "portable"
    if backend in ("reference", "portable"):
        return backend
    reasons = availability()
    usable = ", ".join(name for name, reason in reasons.items() if reason is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; usable on {device}: {usable}")
    reason = reasons[backend] or _why_not_cpu(device, dtypes)
    if reason is not None:
        raise ValueError(
            f"backend={backend!r} is not usable on {device}: {reason}; usable: {usable}"
        )
    return backend


def _why_not_cpu(device: torch.device | str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What the cpu backend refuses; tensors without memory (meta) have nothing to refuse."""
    if torch.device(device).type not in ("cpu", "meta"):
        return f"it reads tensors on the cpu, got {device}; move them or leave backend out"
    for dtype in dtypes:
        if dtype not in DTYPES:
            names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
            return f"it takes {names}, got {dtype}; convert, or ask for backend='portable'"
    return None
