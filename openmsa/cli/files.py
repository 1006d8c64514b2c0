"""Where results go: checked before the work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from openmsa.cli.door import UsageError

MEGABYTE = 1 << 20


def check_vacant(target: Path, *, overwrite: bool) -> None:
    """Raise UsageError for a target that is a file, or holds something and may not be replaced."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"--out {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"--out {target} already holds files; name another, or add --overwrite")


def check_space(target: Path, need_bytes: int = MEGABYTE) -> None:
    """Raise OSError, before any work, where `need_bytes` could not be written at the end."""
    parent = target.absolute()
    while not parent.is_dir():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(f"--out {target} cannot be written: no permission in {parent}")
    free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise OSError(
            f"--out {target} needs about {_megabytes(need_bytes)} and {parent} has "
            f"{_megabytes(free)} free; make room, or name another disk"
        )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / MEGABYTE:,.0f} MB"
