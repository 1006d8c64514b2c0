"""Recipes by name or from a file, with single entries changed on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from openmsa.cli.door import UsageError, usage_checked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmsa.training import Recipe

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or in that json / yaml file, with "key=value" changes made.

    Raises UsageError for an unknown name, a file that cannot be read, and a misspelt key.
    """
    from openmsa.training import RECIPES, recipe_from_dict

    path = Path(name)
    if path.suffix in (".json", ".yaml", ".yml"):
        plain = _read_file(path)
    elif name in RECIPES:
        plain = RECIPES[name]().to_dict()
    else:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)}"
        raise UsageError(f"there is no recipe {name!r}; {hint}, or give a .json or .yaml file")
    for change in changes:
        _change(plain, change)
    _check_kinds(plain)
    with usage_checked():
        return recipe_from_dict(plain)


def _read_file(path: Path) -> dict:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            plain = json.loads(text)
        else:
            import yaml

            plain = yaml.safe_load(text)
    except ValueError as error:
        raise UsageError(f"{path} is no json: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no yaml: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise UsageError(f"{path} holds no recipe: it must be a mapping of keys to values")
    return plain


def _check_kinds(plain: dict) -> None:
    """Raise UsageError where a value is of another kind than its key: "many" for a number."""
    from openmsa.training import DataConfig, Phase, Recipe

    phases, data = plain.get("phases", []), plain.get("data", {})
    if not isinstance(phases, (list, tuple)) or not all(isinstance(p, dict) for p in phases):
        raise UsageError("the recipe's phases must be a list of mappings, one for each phase")
    if not isinstance(data, dict):
        raise UsageError("the recipe's data must be a mapping of keys to values")
    for kind, entry in ((Recipe, plain), (DataConfig, data), *((Phase, p) for p in phases)):
        for field in dataclasses.fields(kind):
            wanted = KINDS.get(type(field.default))
            value = entry.get(field.name, field.default)
            if wanted and not _is_of(value, type(field.default)):
                raise UsageError(f"{field.name}={value!r} of the recipe must be {wanted}")


def _is_of(value: object, kind: type) -> bool:
    """Whole numbers are numbers; true and false are not."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _change(plain: dict, change: str) -> None:
    """Carry out "phases.0.steps=200"; a phase is named by its number or its name."""
    path, equals, value = change.partition("=")
    *parents, last = path.split(".")
    if not equals or not last:
        raise UsageError(f"--set {change!r} must be KEY=VALUE, such as phases.0.steps=200")
    place = plain
    for key in parents:
        place = _entry(place, key, change)
    if not isinstance(place, dict):
        raise UsageError(f"--set {change!r}: {parents[-1]!r} has no entries of its own")
    place[last] = _value(value)


def _entry(place: object, key: str, change: str) -> object:
    if isinstance(place, (list, tuple)):
        by_name = {str(entry.get("name")): entry for entry in place if isinstance(entry, dict)}
        by_number = {str(number): entry for number, entry in enumerate(place)}
        place = by_name | by_number
    if not isinstance(place, dict) or key not in place:
        known = ", ".join(place) if isinstance(place, dict) else "no entries"
        raise UsageError(f"--set {change!r}: there is no {key!r} (there are: {known})")
    return place[key]


def _value(text: str) -> object:
    """Numbers, true, null and lists as json writes them; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
