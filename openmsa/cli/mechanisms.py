"""Which mechanism, with which numbers: the options of `convert` and `train`.

Names, defaults and meanings are written out so that --help need not load torch; a test holds them
against the mechanisms' own configs.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from openmsa.cli.arguments import whole_number
from openmsa.cli.door import UsageError, usage_checked

DEFAULTS: dict[str, dict[str, int | None]] = {
    "msa": {"block_size": 128, "top_k": 16, "d_index": None, "local_blocks": 1, "sink_blocks": 0},
    "nsa": {
        "kernel": 32,
        "stride": 16,
        "block_size": 64,
        "top_k": 16,
        "window": 512,
        "local_blocks": 2,
        "sink_blocks": 1,
    },
    "moba": {"block_size": 4096, "top_k": 12},
    "infllm2": {
        "kernel": 32,
        "stride": 16,
        "block_size": 64,
        "top_k": 96,
        "local_blocks": 32,
        "sink_blocks": 1,
        "dense_below": 8192,
    },
    "dsa": {"top_k": 2048, "index_heads": 64, "d_index": 128},
    "window": {
        "window": 512,
        "sinks": 4,
        "global_blocks": 0,
        "random_blocks": 0,
        "block_size": 64,
        "seed": 0,
    },
}
CONFIGS = {
    "msa": "MSAConfig",
    "nsa": "NSAConfig",
    "moba": "MoBAConfig",
    "infllm2": "InfLLM2Config",
    "dsa": "DSAConfig",
    "window": "WindowConfig",
}
NUMBERS: dict[str, tuple[int, str]] = {
    "block_size": (1, "tokens in a block"),
    "top_k": (1, "blocks (dsa: tokens) kept per query token"),
    "d_index": (1, "index channels; msa, left out: the head dim"),
    "index_heads": (1, "index queries per token"),
    "local_blocks": (0, "latest blocks always kept"),
    "sink_blocks": (0, "first blocks always kept"),
    "window": (1, "latest tokens always read"),
    "sinks": (0, "first tokens always read"),
    "kernel": (1, "tokens whose keys become one"),
    "stride": (1, "tokens from one such kernel to the next"),
    "dense_below": (0, "shorter sequences are read whole"),
    "global_blocks": (0, "first blocks that all read"),
    "random_blocks": (0, "drawn blocks that all read"),
    "seed": (0, "of the drawn blocks"),
}


def add_mechanism_options(parser: argparse.ArgumentParser, note: str = "") -> None:
    """--mechanism, and the fields of every mechanism's config but its layers."""
    group = parser.add_argument_group("mechanism", note)
    group.add_argument("--mechanism", choices=tuple(DEFAULTS), help="left out: msa")
    for name, (least, meaning) in NUMBERS.items():
        told = ", ".join(
            f"{mechanism} {fields[name]}"
            for mechanism, fields in DEFAULTS.items()
            if fields.get(name) is not None
        )
        group.add_argument(flag(name), type=whole_number(least), help=f"{meaning} ({told})")


def chosen_config(arguments: argparse.Namespace, layers: tuple[int, ...] | None):
    """The config that was asked for.

    Raises UsageError for an option of another mechanism and for numbers that contradict each other.
    """
    name = arguments.mechanism or "msa"
    given = {field: getattr(arguments, field) for field in NUMBERS}
    given = {field: number for field, number in given.items() if number is not None}
    if stray := [field for field in given if field not in DEFAULTS[name]]:
        raise UsageError(
            f"{flag(stray[0])} is no option of {name}, which has "
            f"{', '.join(flag(field) for field in DEFAULTS[name])}"
        )
    kind = getattr(import_module(f"openmsa.mechanisms.{name}"), CONFIGS[name])
    with usage_checked():
        return kind(**given, layers=layers)


def flag(field: str) -> str:
    """ "block_size" -> "--block-size"."""
    return "--" + field.replace("_", "-")
