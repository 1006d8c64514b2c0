"""Results as json and back, so that a measured step need not be measured again.

Results are frozen dataclasses of numbers, texts, tuples and dicts; json holds their fields and
nothing else. Reading is strict: a field that is missing or unknown is named.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists; numbers that json lacks (nan, inf) to None."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_plain(kind: type[Result], data: Any) -> Result:
    """The dataclass `kind` from what `to_plain` made of it. Raises ValueError naming the field."""
    names = [f.name for f in dataclasses.fields(kind)]
    required = {f.name for f in dataclasses.fields(kind) if _is_required(f)}
    if unknown := set(data) - set(names):
        raise ValueError(f"{kind.__name__} has no field {sorted(unknown)[0]!r}; it has {names}")
    if missing := required - set(data):
        raise ValueError(f"{kind.__name__} lacks the field {sorted(missing)[0]!r}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _build(hints[name], data[name]) for name in names if name in data})


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write a result as json, whole or not at all; returns the path."""
    return write_whole(path, json.dumps(to_plain(value), indent=1, allow_nan=False) + "\n")


def read_json(kind: type[Result], path: str | os.PathLike) -> Result:
    """Read a result that `write_json` wrote. Raises ValueError for a file of another kind."""
    return from_plain(kind, json.loads(Path(path).read_text(encoding="utf-8")))


def write_whole(path: str | os.PathLike, text: str) -> Path:
    """Write text beside `path` and move it there, so `path` never holds half of it."""
    path = Path(path)
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
    return path


def _is_required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _build(hint: Any, data: Any) -> Any:
    """Plain data as what a field's type says: dataclasses, tuples, dicts, and either of a union."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return _build(next(kind for kind in inner if kind is not type(None)), data)
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, data)
    if origin is dict:
        return {key: _build(inner[1], item) for key, item in data.items()}
    if origin is tuple:
        kinds = inner[:1] * len(data) if inner[1:] == (...,) else inner
        return tuple(_build(kind, item) for kind, item in zip(kinds, data, strict=True))
    return _tuples(data) if hint is tuple else data


def _tuples(data: Any) -> Any:
    return tuple(_tuples(item) for item in data) if isinstance(data, list) else data
