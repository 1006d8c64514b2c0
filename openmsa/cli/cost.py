"""openmsa cost: what each mechanism would cost, counted and estimated before anything is bought."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from openmsa.accounting.designs import DESIGNS
from openmsa.cli.arguments import add_out_options, subset_of, whole_number
from openmsa.cli.console import say
from openmsa.cli.door import UsageError, usage_checked
from openmsa.cli.files import check_space, check_vacant

DESCRIPTION = (
    "FLOPs, bytes, cache, seconds and dollars of a model under dense attention and six sparse "
    "mechanisms, for prompts and for decoding. FLOPs, bytes and cache are counted; seconds and "
    "dollars are estimates from a chip's peak rates and the efficiencies you state, never "
    "measurements (`openmsa bench` measures)."
)
EXAMPLE = (
    "openmsa cost --model qwen3-32b --chip h200 --context 8K,128K,1M "
    "--set msa.top_k=32 --out runs/cost"
)
NAMES = tuple(DESIGNS)
UNITS = {"K": 1 << 10, "M": 1 << 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="msa-109b",
        help="a ready-made shape (--list), a transformers config.json or the folder that holds it",
    )
    parser.add_argument("--chip", default="h100", help="a chip of the table (--list)")
    parser.add_argument("--chip-file", type=Path, help="json with chips of your own, as chips.json")
    parser.add_argument(
        "--context", type=contexts, default="8K,128K,1M", help="tokens; K and M are powers of two"
    )
    parser.add_argument(
        "--mechanism", type=subset_of(*NAMES), default=",".join(NAMES), help="which to compare"
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="MECHANISM.NUMBER=VALUE",
        help="change a number of a mechanism, as in msa.top_k=32; may be given again",
    )
    parser.add_argument(
        "--dense-layers",
        type=whole_number(0),
        help="layers whose attention stays dense; left out: those of the shape",
    )
    _add_assumptions(parser)
    parser.add_argument("--list", action="store_true", help="chips, shapes, mechanisms; no more")
    add_out_options(parser, required=False, what="cost.csv, cost.json and the plot (png, svg)")


def _add_assumptions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("assumptions")
    group.add_argument("--batch", type=whole_number(1), default=8, help="sequences decoded at once")
    group.add_argument(
        "--chips", type=whole_number(1), help="how many; left out: the fewest that hold everything"
    )
    group.add_argument(
        "--weight-bytes", type=int, choices=(1, 2), default=2, help="of a weight; 1: fp8"
    )
    group.add_argument(
        "--cache-bytes", type=int, choices=(1, 2), default=2, help="of a cached channel; 1: fp8"
    )
    group.add_argument(
        "--matrix-efficiency", type=_share, default=0.63, help="of the peak; the paper's dense"
    )
    group.add_argument(
        "--memory-efficiency", type=_share, default=0.77, help="of the peak; the paper's dense"
    )


def run(arguments: argparse.Namespace) -> None:
    from openmsa.accounting import chips, designs, shapes
    from openmsa.cli import cost_report, cost_table

    if arguments.chip_file and not arguments.chip_file.is_file():
        raise UsageError(f"--chip-file {arguments.chip_file} is no file")
    with usage_checked():
        known = chips.chips(arguments.chip_file)
        if arguments.list:
            cost_table.list_all(known, shapes.shapes())
            return
        chip = chips.find(arguments.chip, arguments.chip_file)
        shape = shapes.find(arguments.model)
        if arguments.dense_layers is not None:
            shape = dataclasses.replace(shape, dense_attention_layers=arguments.dense_layers)
        changes = _changes(arguments.set or [])
        asked = {name: designs.make(name, changes.get(name)) for name in arguments.mechanism}
    if unused := sorted(set(changes) - set(asked)):
        raise UsageError(f"--set names {unused[0]}, which is not among --mechanism")
    if arguments.out:
        check_vacant(arguments.out, overwrite=arguments.overwrite)
        check_space(arguments.out)
    report = cost_report.make(
        shape, chip, asked, arguments.context, _assumptions(arguments), " ".join(_command())
    )
    cost_table.show(report)
    if arguments.out:
        for path in cost_report.write(report, arguments.out):
            say(f"wrote {path}")


def contexts(text: str) -> tuple[int, ...]:
    """Read "8K,128K,1M" or "1000": ascending numbers of tokens, each once."""
    found = set()
    for part in text.split(","):
        part = part.strip()
        digits, unit = (part[:-1], part[-1].upper()) if part[-1:].isalpha() else (part, "")
        if not digits.isdigit() or unit not in ("", *UNITS):
            raise argparse.ArgumentTypeError(f'{part!r} is no number of tokens; write "8K,128K,1M"')
        found.add(int(digits) * UNITS.get(unit, 1))
    if not all(1 <= tokens <= 1 << 24 for tokens in found):
        raise argparse.ArgumentTypeError(f"{text!r} must hold numbers of tokens from 1 to 16M")
    return tuple(sorted(found))


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return number


def _changes(settings: list[str]) -> dict[str, dict[str, int]]:
    """["msa.top_k=32"] -> {"msa": {"top_k": 32}}"""
    found: dict[str, dict[str, int]] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        name, dot, number = key.partition(".")
        if not dot or not value.isdigit():
            raise ValueError(f"--set {setting}: write MECHANISM.NUMBER=VALUE, as in msa.top_k=32")
        if name not in DESIGNS:
            raise ValueError(f"--set {setting}: there is no mechanism {name!r}; {', '.join(NAMES)}")
        found.setdefault(name, {})[number] = int(value)
    return found


def _assumptions(arguments: argparse.Namespace):
    from openmsa.accounting.layer_cost import Assumptions

    return Assumptions(
        matrix_efficiency=arguments.matrix_efficiency,
        memory_efficiency=arguments.memory_efficiency,
        weight_bytes=arguments.weight_bytes,
        cache_bytes=arguments.cache_bytes,
        batch=arguments.batch,
        chips=arguments.chips,
    )


def _command() -> list[str]:
    return ["openmsa", *(shlex.quote(part) for part in sys.argv[1:])]
