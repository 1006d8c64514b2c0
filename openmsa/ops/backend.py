"""Backends: asked for by name or chosen by device, never swapped silently."""

from __future__ import annotations

import torch

BACKENDS = ("reference", "portable", "cpu", "triton")

# None: usable. Otherwise why not, in words that `openmsa env` prints.
_UNAVAILABLE = {
    "reference": None,
    "portable": None,
    "cpu": "the native C++ kernels are not part of this version",
    "triton": "the Triton kernels are not part of this version",
}


def availability() -> dict[str, str | None]:
    """Every backend's name, with None if it is usable here and the reason if it is not."""
    return dict(_UNAVAILABLE)


def choose(backend: str | None, device: torch.device | str) -> str:
    """The backend for tensors on `device`: the one asked for; if None, the fastest usable one.

    Raises ValueError for an unknown name and for a backend that is not usable here.
    """
    usable = [name for name, reason in _UNAVAILABLE.items() if reason is None]
    if backend is None:
        return "portable"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; usable on {device}: {', '.join(usable)}")
    if (reason := _UNAVAILABLE[backend]) is not None:
        raise ValueError(
            f"backend={backend!r} is not usable on {device}: {reason}; usable: {', '.join(usable)}"
        )
    return backend
