"""Files that are either whole or absent: checked beforehand, written aside, moved into place."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openmsa.cli.door import UsageError

MEGABYTE = 1 << 20


def check_target(target: Path, *, overwrite: bool, need_bytes: int = MEGABYTE) -> None:
    """Refuse, before any work, a folder that could not be written at the end.

    Raises UsageError for a target that is a file or a folder with something in it (unless
    `overwrite`), OSError where it may not be written or the disk is too full for `need_bytes`.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"--out {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"--out {target} already holds files; name another, or add --overwrite")
    parent = _nearest_existing(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(f"--out {target} cannot be written: no permission in {parent}")
    free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise OSError(
            f"--out {target} needs about {_megabytes(need_bytes)} and {parent} has "
            f"{_megabytes(free)} free; make room, or name another disk"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it becomes `target` only when the body succeeds.

    What `target` held before is removed after the new one is in place, and stays on failure.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        yield aside
        for path in aside.rglob("*"):
            _flush(path)
        aside.chmod(0o777 & ~_umask())
        _replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _flush(target.parent)


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON, whole or not at all. NaN and infinity become null."""
    write_text(path, json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _replace_folder(aside: Path, target: Path) -> None:
    if not target.exists():
        return aside.rename(target)
    before = Path(tempfile.mkdtemp(prefix=f".{target.name}.before-", dir=target.parent))
    target.rename(before / target.name)
    try:
        aside.rename(target)
    except OSError:
        (before / target.name).rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
    return None


def _flush(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / MEGABYTE:,.0f} MB"


def _jsonable(content: object) -> object:
    if isinstance(content, dict):
        return {str(key): _jsonable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_jsonable(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if hasattr(content, "tolist"):
        return _jsonable(content.tolist())
    return content
