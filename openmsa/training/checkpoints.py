"""Checkpoints that know whether they are whole.

`transformers.Trainer` writes a checkpoint file by file; a process killed in between leaves a folder
that looks finished. Here a checkpoint counts only once it is sealed: a list of its files with sizes
and SHA-256 sums, written last and moved into place in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

SEAL = "openmsa_seal.json"


def seal(folder: Path) -> None:
    """Write the list of files with their sums into `folder`; from then on it is a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        _flush(path)
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in files}
    write_json(folder / SEAL, sums)


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None if it is whole."""
    try:
        sums = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError):
        return f"its {SEAL} cannot be read"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sum(path) != expected:
            return f"{name} has changed or is cut short"
    return None


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged `checkpoint-N` in `folder`, and a line on each newer one passed over."""
    numbered = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            numbered.append((int(number), path))
    passed_over = []
    for _, path in sorted(numbered, reverse=True):
        fault = damage(path)
        if fault is None:
            return path, passed_over
        passed_over.append(f"{path} is not used: {fault}")
    return None, passed_over


def write_json(path: Path, data: object) -> None:
    """Write json so that `path` holds either the old or the whole new content, never half of it."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(data, indent=1))
    _flush(temporary)
    temporary.replace(path)


def save_whole(model, tokenizer, folder: Path, weights: dict | None = None) -> None:
    """Save a model with its tokenizer into `folder`, which appears complete or not at all.

    weights: all of them by name, where `model` itself holds only a part.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        seal(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(
            f"{folder} could not be written ({error}); free space or change out"
        ) from error


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
