"""Engines that can be judged, by name: our backends, and others where they are installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from openmsa.conformance.adapter import Adapter


@dataclass(frozen=True)
class Engine:
    """where: "module:Class"; package: whose version is judged; install: how to get it."""

    where: str
    package: str
    install: str


_OURS = "openmsa.conformance.adapters.ours"
_OTHERS = "openmsa.conformance.adapters"
ENGINES = {
    "reference": Engine(f"{_OURS}:Reference", "openmsa", ""),
    "portable": Engine(f"{_OURS}:Portable", "openmsa", ""),
    "cpu": Engine(f"{_OURS}:Cpu", "openmsa", "pip install openmsa (with a C++ compiler)"),
    "triton": Engine(f"{_OURS}:Triton", "openmsa", "pip install triton, and a GPU"),
    "transformers": Engine(
        f"{_OTHERS}.transformers_m3:TransformersM3",
        "transformers",
        "pip install 'openmsa[hf]' (minimax_m3_vl is in transformers 5.17 and later)",
    ),
    "enabled-m3": Engine(f"{_OTHERS}.enabled_m3:EnabledM3", "openmsa", "pip install 'openmsa[hf]'"),
    "nemo-automodel": Engine(
        f"{_OTHERS}.nemo_automodel:NemoAutomodel",
        "nemo-automodel",
        "pip install --no-deps nemo-automodel, beside torch and transformers",
    ),
    "mlx-lm": Engine(f"{_OTHERS}.mlx_lm:MlxLm", "mlx-lm", "pip install 'mlx[cpu]' mlx-lm"),
    "mlx-vlm": Engine(f"{_OTHERS}.mlx_vlm:MlxVlm", "mlx-vlm", "pip install 'mlx[cpu]' mlx-vlm"),
    "fla-core": Engine(
        f"{_OTHERS}.fla_core:FlaCore",
        "fla-core",
        "pip install --no-deps fla-core && pip install einops triton",
    ),
    "flash-msa": Engine(
        f"{_OTHERS}.flash_msa:FlashMsa",
        "flash-msa",
        "pip install --no-deps flash-msa (its eager model needs no GPU)",
    ),
}


def open_adapter(name: str) -> Adapter:
    """An adapter by its name in ENGINES, or by "module:Class".

    Raises ValueError for an unknown name, and for an engine that is not installed or not usable
    here, with what to install.
    """
    engine = ENGINES.get(name)
    where, colon, made = (engine.where if engine else name).partition(":")
    if not colon:
        known = ", ".join(ENGINES)
        raise ValueError(f"there is no adapter {name!r}; give module:Class, or one of {known}")
    try:
        found = getattr(importlib.import_module(where), made)()
    except (ImportError, AttributeError) as error:
        remedy = engine.install if engine else "put its folder on PYTHONPATH"
        raise ValueError(f"adapter {name} cannot be loaded: {error}; {remedy}") from error
    return found


def package_version(package: str) -> str:
    """The version of an installed package, or "unknown"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
