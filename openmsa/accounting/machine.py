"""What machine this is, how much memory is left and used, and which code ran."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def device() -> str:
    """The processor or GPU, with what matters of it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def processor() -> str:
    """The processor's name, the threads that torch uses on it, and torch's instruction set."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name") or platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit this ran on, "dirty" where something was changed; the version where no git is."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if not (ROOT / ".git").exists():
        return _version()  # installed: a repository around it would be somebody else's
    try:
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return _version()
    return told.stdout.strip()


def cores() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def available_bytes() -> int | None:
    """Memory that could be taken without swapping; None where the system does not say."""
    found = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    return None if found is None else 1024 * found


def resident_bytes() -> int:
    """Memory this process holds now; 0 where the system does not say."""
    return 1024 * (_kilobytes(Path("/proc/self/status"), "VmRSS") or 0)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    found = _kilobytes(Path("/proc/self/status"), "VmHWM")
    if found is not None:
        return 1024 * found
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> bool:
    """Give free memory back and let `peak_bytes` count from now on; False where that fails."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (AttributeError, OSError):
        return False
    return True


def _kilobytes(file: Path, field: str) -> int | None:
    if not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    return None


def _version() -> str:
    try:
        return f"openmsa {version('openmsa')}"
    except PackageNotFoundError:
        return "unknown"
