"""Chips: what they promise and what an hour of them costs (chips.json names the sources)."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path

from openmsa.accounting.shapes import from_fields

SHIPPED = Path(__file__).parent / "chips.json"


@dataclass(frozen=True)
class Chip:
    """Peak rates a second, memory in bytes. None: not there, or not known."""

    name: str
    bf16_flops: float
    memory_rate: float
    memory_bytes: float
    fp8_flops: float | None = None
    dollars_per_hour: float | None = None
    title: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("bf16_flops", "memory_rate", "memory_bytes"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(
                    f"chip {self.name}: {name} must be a number above 0, got {value!r}"
                )
        for name in ("fp8_flops", "dollars_per_hour"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or not value > 0):
                raise ValueError(f"chip {self.name}: {name} must be null or above 0, got {value!r}")

    def matrix_rate(self, element_bytes: int) -> float:
        """Peak of products of such elements; bf16's where the chip has no fp8."""
        return self.fp8_flops if element_bytes == 1 and self.fp8_flops else self.bf16_flops


def chips(file: Path | None = None) -> dict[str, Chip]:
    """The shipped chips; those of a user's file of the same form are added or stand instead."""
    found = _read(SHIPPED)
    return found if file is None else {**found, **_read(file)}


def find(name: str, file: Path | None = None) -> Chip:
    """The chip with that name."""
    known = chips(file)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"there is no chip {name!r}; {hint}; a file of your own may name more")


def _read(path: Path) -> dict[str, Chip]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no json: {error}") from None
    entries = told.get("chips") if isinstance(told, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f'{path} holds no chips; it must be {{"chips": {{"name": {{...}}}}}}')
    return {name: from_fields(Chip, name, values, str(path)) for name, values in entries.items()}
