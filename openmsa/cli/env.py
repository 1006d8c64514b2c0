"""openmsa env: what is here, and what is not, with the reason."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from openmsa.cli.console import table
from openmsa.evaluation.plain import write_json

DESCRIPTION = "Python, packages, processor, devices and backends; why a backend is not usable."
EXAMPLE = "openmsa env --out runs/env"

PACKAGES = {
    "torch": "always",
    "transformers": "hf",
    "accelerate": "hf",
    "safetensors": "hf",
    "tokenizers": "hf",
    "datasets": "train",
    "pyarrow": "train",
    "tensorboard": "train",
    "matplotlib": "report",
    "rich": "report",
    "triton": "the triton backend",
}
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder for env.json")


def run(arguments: argparse.Namespace) -> None:
    facts = {"machine": machine(), "packages": packages(), "backends": backends()}
    if arguments.out:
        write_json(arguments.out / "env.json", facts)
    table("Machine", ("what", "value"), facts["machine"].items())
    rows = [(name, found or "missing", PACKAGES[name]) for name, found in facts["packages"].items()]
    table("Packages", ("package", "version", "needed for"), rows)
    rows = [(name, "yes" if why is None else "no", why or "") for name, why in backends().items()]
    table("Backends", ("backend", "usable", "why not"), rows)


def machine() -> dict[str, str]:
    """What this machine is, in words."""
    import torch

    devices = ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "openmsa": _version("openmsa") or "not installed (run from its folder)",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores usable": str(_usable_cores()),
        "torch threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "processor flags": " ".join(cpu_flags()) or "unknown",
        "devices": ", ".join(devices),
        "cuda of torch": torch.version.cuda or torch.version.hip or "none",
    }


def packages() -> dict[str, str | None]:
    """Versions of the packages that OpenMSA uses; None for one that is missing."""
    return {name: _version(name) for name in PACKAGES}


def backends() -> dict[str, str | None]:
    """Backends with None where usable, else the reason."""
    from openmsa.ops.backend import availability

    return availability()


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets that matter here, as Linux names them; none known elsewhere."""
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return [flag for flag in CPU_FLAGS if flag in flags.split()]
    return []


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
