"""openmsa inspect: what the index selects, or whether a dense model would bear MSA."""

from __future__ import annotations

import argparse

from openmsa.cli.arguments import add_budget_options, add_model_options, add_out_options, budget
from openmsa.cli.bearing import add_bearing_options, judged, pieces
from openmsa.cli.console import progress, say, table
from openmsa.cli.door import UsageError
from openmsa.cli.files import check_space, check_vacant
from openmsa.cli.models import load_model, load_tokenizer
from openmsa.evaluation.plain import write_json

DESCRIPTION = (
    "Look into a model. Converted: recall of the index, and maps of which blocks each layer and "
    "group selects. Dense: how much attention the best blocks of a budget would capture, how much "
    "an index derived from the model would, and which layers to keep dense."
)
EXAMPLE = "openmsa inspect runs/dense --block-size 16 --top-k 8 --text book.txt --out runs/look"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, or name on the hub")
    add_out_options(parser, required=False, what="inspection.json and figures (png, svg)")
    add_budget_options(parser, note="of a dense model; a converted one brings its own")
    add_bearing_options(parser)
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.out:
        check_vacant(arguments.out, overwrite=arguments.overwrite)
        check_space(arguments.out)
    config = budget(arguments, layers=None)
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    from openmsa import hf
    from openmsa.evaluation import canvas, figures, maps

    if hf.is_converted(model):
        told, shown = look(model, tokenizer, arguments)
        draw = maps.selection_maps
    else:
        shown = judged(model, tokenizer, config, arguments)
        say(f"keep dense: {shown.keep_dense or 'none'}; convert: {shown.convert or 'none'}")
        told, draw = {"bearing": shown}, figures.mass_by_layer
    if arguments.out:
        write_json(arguments.out / "inspection.json", {"model": arguments.model, **told})
        canvas.save(draw(shown), arguments.out / draw.__name__)
        say(f"wrote {arguments.out}")


def look(model, tokenizer, arguments: argparse.Namespace) -> tuple[dict, object]:
    """Recall, where there is an index, and selection map: (both to write, the map to draw)."""
    from openmsa import hf
    from openmsa.evaluation.inspection import selection_map
    from openmsa.evaluation.recall import MEASURES, evaluate_recall

    budget = hf.room_of(model).budget
    if budget is None:
        raise UsageError(
            f"{arguments.model} reads by position alone ({hf.mechanism_of(model)}): it has no "
            "index, and selects nothing that could be mapped"
        )
    read, told = pieces(model, tokenizer, budget, arguments), {}
    with progress("reading", 2 * len(read)) as bar:
        if hf.has_index(model):
            told["recall"] = evaluate_recall(
                model, read, max_queries=256, batch_size=1, progress=lambda *_: bar.advance()
            )
        maps = selection_map(model, read)
    if "recall" in told:
        rows = [[row["layer"], *(row[m] for m in MEASURES)] for row in told["recall"].rows()]
        table("Recall of the index", ("layer", *(m.replace("_", " ") for m in MEASURES)), rows)
    else:
        say(f"{hf.mechanism_of(model)} has no index, so there is no recall")
    return {**told, "selection_map": maps}, maps
