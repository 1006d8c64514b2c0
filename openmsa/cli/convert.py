"""openmsa convert: a dense checkpoint becomes MSA or another mechanism, and back."""

from __future__ import annotations

import argparse
from dataclasses import fields

from openmsa.cli.arguments import (
    add_model_options,
    add_out_options,
    layer_list,
)
from openmsa.cli.bearing import add_bearing_options, judged
from openmsa.cli.console import progress, say, table
from openmsa.cli.door import UsageError
from openmsa.cli.files import check_space, check_vacant
from openmsa.cli.mechanisms import add_mechanism_options, chosen_config, flag
from openmsa.cli.models import check_name, has_tokenizer, load_model, load_tokenizer

DESCRIPTION = (
    "Give a dense checkpoint an index branch, derived from its own projections, or what another "
    "mechanism adds, and save it; every other weight is kept. AutoModelForCausalLM loads the "
    "result after `import openmsa.hf`."
)
EXAMPLE = "openmsa convert runs/dense --out runs/msa --block-size 64 --top-k 16 --layers 2-27"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, or name on the hub")
    add_out_options(parser, required=True, what="the new checkpoint")
    add_mechanism_options(parser)
    parser.add_argument(
        "--layers",
        type=layer_list,
        default="all",
        help='"0,2-5", "all", or "auto": those that would bear the budget',
    )
    parser.add_argument(
        "--init", choices=("main", "random"), default="main", help="where the index starts from"
    )
    parser.add_argument("--to-dense", action="store_true", help="take what was added away again")
    add_bearing_options(parser)
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    from openmsa.training.parallel import join

    if join().first:  # one conversion is enough, however many processes were started
        convert_one(arguments)


def convert_one(arguments: argparse.Namespace) -> None:
    """Load, convert and save."""
    check_vacant(arguments.out, overwrite=arguments.overwrite)
    auto = arguments.layers == "auto"
    if auto and arguments.mechanism not in (None, "msa"):
        raise UsageError("--layers auto judges by an MSA index; name the layers, or leave it out")
    config = chosen_config(arguments, layers=None if auto else arguments.layers)
    check_name(arguments.model)
    tokenizer = load_tokenizer(arguments.model) if has_tokenizer(arguments.model) else None
    if tokenizer is None and auto:
        raise UsageError(f"{arguments.model} has no tokenizer, so --layers auto cannot read text")
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    check_space(arguments.out, 2 * model_bytes(model))
    check_direction(model, arguments)
    if arguments.to_dense:
        make_dense(model)
    else:
        if auto:
            bearing = layers_that_bear(model, tokenizer, config, arguments)
            config = chosen_config(arguments, layers=bearing)
        make_sparse(model, config, init=arguments.init)
    from openmsa.training.checkpoints import save_whole

    with progress(f"saving {arguments.out}"):
        save_whole(model, tokenizer, arguments.out)
    say(f"saved {arguments.out}")


def check_direction(model, arguments: argparse.Namespace) -> None:
    """Raise UsageError for a model that is already what it should become."""
    from openmsa import hf

    if arguments.to_dense and not hf.is_converted(model):
        raise UsageError(f"{arguments.model} is dense already")
    if not arguments.to_dense and hf.is_converted(model):
        name = "MSA" if hf.is_msa(model) else hf.mechanism_of(model)
        raise UsageError(f"{arguments.model} is {name} already; --to-dense takes it back")


def layers_that_bear(model, tokenizer, config, arguments: argparse.Namespace) -> tuple[int, ...]:
    """The layers that inspection would convert. Raises ValueError where it is none."""
    layers = judged(model, tokenizer, config, arguments).convert
    if not layers:
        raise ValueError("no layer would bear this budget; raise --top-k or --block-size")
    return tuple(layers)


def make_dense(model) -> None:
    """Take what was added away, in place, and tell so."""
    from openmsa import hf

    hf.to_dense(model)
    table("Dense again", ("what", "value"), [("model", type(model).__name__)])


def make_sparse(model, config, *, init: str) -> None:
    """Convert a dense model, in place, and tell what was added."""
    from openmsa import hf

    hf.convert(model, config, init=init)
    layers, room = hf.msa_layers(model), hf.room_of(model)
    added = sum(parameter.numel() for _, parameter in hf.added_parameters(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        ("model", type(model).__name__),
        ("sparse layers", f"{len(layers)} of {model.config.num_hidden_layers}: {_runs(layers)}"),
    ]
    if hf.is_msa(model):
        rows.append(("tokens read per query and group", f"{config.top_k} x {config.block_size}"))
    else:
        rows += [("mechanism", room.NAME), *_numbers(config)]
    what = "index parameters" if room.INDEX else "parameters added"
    rows.append((what, f"{added:,} ({added / total:.2%} of all)"))
    if room.INDEX:
        rows.append(("index from", "the main projections" if init == "main" else "random numbers"))
    table("Converted", ("what", "value"), rows)


def _numbers(config) -> list[tuple[str, str]]:
    return [
        (flag(f.name), str(getattr(config, f.name))) for f in fields(config) if f.name != "layers"
    ]


def model_bytes(model) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _runs(numbers: list[int]) -> str:
    """[0, 2, 3, 4] -> "0,2-4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
