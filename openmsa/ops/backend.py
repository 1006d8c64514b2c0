"""Backends: asked for by name or chosen by device and dtype, never swapped silently."""

from __future__ import annotations

import torch

from openmsa import native
from openmsa.ops import gpu
from openmsa.ops.native_calls import DTYPES

BACKENDS = ("reference", "portable", "cpu", "triton")


def availability() -> dict[str, str | None]:
    """Every backend's name, with None if it is usable here and the reason if it is not."""
    return {
        "reference": None,
        "portable": None,
        "cpu": native.unavailable(),
        "triton": gpu.unavailable(),
    }


def choose(
    backend: str | None, device: torch.device | str, *dtypes: torch.dtype, index: bool = False
) -> str:
    """The backend for tensors of `dtypes` on `device`: the one asked for; if None, the fastest
    usable one. index: only index scores are wanted, which triton also computes from fp8.

    Raises ValueError for an unknown name and for a backend that is not usable here.
    """
    if backend is None:
        fastest = {"cpu": "cpu", "cuda": "triton"}.get(torch.device(device).type)
        return fastest if fastest and not _why_not(fastest, device, dtypes, index) else "portable"
    if backend in ("reference", "portable"):
        return backend
    usable = ", ".join(name for name, reason in availability().items() if reason is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; usable on {device}: {usable}")
    if (reason := _why_not(backend, device, dtypes, index)) is not None:
        raise ValueError(
            f"backend={backend!r} is not usable on {device}: {reason}; usable: {usable}"
        )
    return backend


def _why_not(
    backend: str, device: torch.device | str, dtypes: tuple[torch.dtype, ...], index: bool
) -> str | None:
    """What `cpu` or `triton` refuses, or None; tensors without memory (meta) lie anywhere."""
    if (reason := availability()[backend]) is not None:
        return reason
    here = "cpu" if backend == "cpu" or gpu.interpreted() else "cuda"
    if torch.device(device).type not in (here, "meta"):
        where = {"cpu": "the cpu", "cuda": "a GPU"}[here]
        return f"it reads tensors on {where}, got {device}; move them or leave backend out"
    takes = DTYPES if backend == "cpu" else gpu.INDEX_DTYPES if index else gpu.DTYPES
    for dtype in dtypes:
        if dtype not in takes:
            names = ", ".join(str(each).removeprefix("torch.") for each in takes)
            return f"it takes {names}, got {dtype}; convert, or ask for backend='portable'"
    return None
