"""Arguments that several verbs share, each with its rule."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from openmsa.cli.door import usage_checked

if TYPE_CHECKING:
    from openmsa import MSAConfig

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def whole_number(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return number

    return read


def whole_numbers(text: str) -> tuple[int, ...]:
    """Read "512,1024,2048": ascending whole numbers from 1 on, each once."""
    read = whole_number(1)
    return tuple(sorted({read(part.strip()) for part in text.split(",")}))


def shares(text: str) -> tuple[float, ...]:
    """Read "0,0.5,1": numbers from 0 to 1, ascending, each once."""
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 0 to 1")
    return tuple(numbers)


def layer_list(text: str) -> tuple[int, ...] | str | None:
    """Read "all" (None), "auto", or layer numbers and ranges such as "0,2-5"."""
    if text in ("all", "auto"):
        return None if text == "all" else text
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise argparse.ArgumentTypeError(
                f'{part!r} is no layer number or range; write "0,2-5", "all" or "auto"'
            )
        layers.update(range(int(first), int(last) + 1))
    return tuple(sorted(layers))


def subset_of(*names: str) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated names out of `names`, kept in their order."""

    def read(text: str) -> tuple[str, ...]:
        asked = {part.strip() for part in text.split(",")}
        if unknown := sorted(asked - set(names)):
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}"
            )
        return tuple(name for name in names if name in asked)

    return read


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How models are loaded: --device and --dtype."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as saved")


def add_budget_options(parser: argparse.ArgumentParser, note: str = "") -> None:
    """What is kept of the context: the fields of MSAConfig but its layers."""
    group = parser.add_argument_group("budget", note)
    number, count = whole_number(1), whole_number(0)
    group.add_argument("--block-size", type=number, default=128, help="tokens in a block")
    group.add_argument("--top-k", type=number, default=16, help="blocks kept per token and group")
    group.add_argument("--d-index", type=number, help="index channels; left out: the head dim")
    group.add_argument("--local-blocks", type=count, default=1, help="latest blocks always kept")
    group.add_argument("--sink-blocks", type=count, default=0, help="first blocks always kept")


def budget(arguments: argparse.Namespace, layers: tuple[int, ...] | None) -> MSAConfig:
    """The budget that was asked for. Raises UsageError where its numbers contradict each other."""
    from openmsa import MSAConfig

    with usage_checked():
        return MSAConfig(
            block_size=arguments.block_size,
            top_k=arguments.top_k,
            d_index=arguments.d_index,
            local_blocks=arguments.local_blocks,
            sink_blocks=arguments.sink_blocks,
            layers=layers,
        )


def add_out_options(parser: argparse.ArgumentParser, *, required: bool, what: str) -> None:
    """Where results go: --out and --overwrite."""
    parser.add_argument("--out", type=Path, required=required, help=f"folder for {what}")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
