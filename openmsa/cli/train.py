"""openmsa train: a recipe, start to end, resumed where it was left."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from openmsa.cli.arguments import layer_list, whole_number
from openmsa.cli.console import progress, say
from openmsa.cli.convert import make_sparse
from openmsa.cli.curves import draw_curves, report
from openmsa.cli.door import UsageError
from openmsa.cli.files import check_space
from openmsa.cli.mechanisms import add_mechanism_options, chosen_config
from openmsa.cli.models import load_model, load_tokenizer
from openmsa.cli.recipes import read_recipe
from openmsa.cli.together import add_process_options, first_speaks, meet

DESCRIPTION = (
    "Train by a recipe: phases of dense attention, index warm-up and sparse attention. Run again "
    "with the same --out, it goes on where it was left, to the same weights. A dense model is "
    "converted first if the recipe has a phase that is not dense; a mechanism without an index "
    "trains sparse where MSA would warm up."
)
EXAMPLE = "openmsa train --recipe dense-byte-3m --set phases.0.steps=200 --out runs/dense"
NEW = "new"
# Written out, so that --help need not load what the recipes are made of.
RECIPE_NAMES = ("msa-cpt", "msa-cpt-dense-twin", "msa-pt", "msa-pt-dense-twin", "dense-byte-3m")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", required=True, help=f"{', '.join(RECIPE_NAMES)}, or a json / yaml file"
    )
    parser.add_argument("--out", type=Path, help="folder of the run: checkpoints, logs, the model")
    parser.add_argument(
        "--model", default=NEW, help='checkpoint to start from; "new": random, 3M, bytes as tokens'
    )
    parser.add_argument("--data", help='"stdlib", a file, a folder or a saved data set')
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe: phases.0.steps=200, data.retrieval_share=0",
    )
    parser.add_argument("--print-recipe", action="store_true", help="print it as json and stop")
    number = whole_number(1)
    parser.add_argument("--probe-every", type=number, default=50, help="steps between recalls")
    add_mechanism_options(parser, note="where a dense model is converted first")
    parser.add_argument("--layers", type=layer_list, help='"0,2-5"; left out: all')
    parser.add_argument("--init", choices=("main", "random"), help="left out: main, new: random")
    add_process_options(parser)


def run(arguments: argparse.Namespace) -> int:
    processes = meet(arguments)
    return first_speaks(processes, lambda: train_with(arguments, processes))


def train_with(arguments: argparse.Namespace, processes) -> None:
    """What one of the processes does."""
    changes = [*arguments.set, *([f"data.source={arguments.data}"] if arguments.data else [])]
    recipe = read_recipe(arguments.recipe, changes)
    if arguments.print_recipe:
        print(json.dumps(recipe.to_dict(), indent=2))
        return
    if arguments.out is None:
        raise UsageError("--out FOLDER is missing: where the run is kept")
    if arguments.layers == "auto":
        raise UsageError("--layers auto is for `openmsa convert`; convert first, then train")
    model, tokenizer = starting_point(recipe, arguments)
    recipe = fit(recipe, model, arguments)
    # Weights in fp32 and two moments of Adam; two checkpoints are kept while a third is written.
    check_space(arguments.out, 3 * 3 * 4 * sum(p.numel() for p in model.parameters()))
    from openmsa.training import history, train

    total = sum(phase.steps for phase in recipe.phases)
    with progress(recipe.name, total) as bar:
        train(
            recipe,
            model=model,
            tokenizer=tokenizer,
            out=arguments.out,
            probe=recall_probe(recipe, model, tokenizer),
            probe_every=arguments.probe_every,
            callbacks=(step_counter(recipe, bar),),
            say=say,
            processes=processes,
        )
    if not processes.first:
        return
    lines = history(arguments.out)
    draw_curves(lines, arguments.out)
    report(lines, recipe)
    last = f"{len(recipe.phases) - 1}-{recipe.phases[-1].name}"
    say(f"the trained model: {arguments.out / last / 'model'}")


def starting_point(recipe, arguments: argparse.Namespace):
    """The model and tokenizer to train, converted where the recipe needs an index."""
    from openmsa import hf

    new = arguments.model == NEW
    if new:
        from openmsa.training.byte_tokenizer import byte_tokenizer
        from openmsa.training.models import byte_model

        model, tokenizer = byte_model(seed=recipe.seed), byte_tokenizer()
    else:
        tokenizer = load_tokenizer(arguments.model)
        model = load_model(arguments.model, device="cpu", dtype="float32")
    if any(phase.attention != "dense" for phase in recipe.phases) and not hf.is_converted(model):
        config = chosen_config(arguments, layers=arguments.layers)
        make_sparse(model, config, init=arguments.init or ("random" if new else "main"))
    had = hf.mechanism_of(model)
    if hf.is_converted(model) and arguments.mechanism not in (None, had):
        raise UsageError(f"{arguments.model} is {had} already, not {arguments.mechanism}")
    return model, tokenizer


def fit(recipe, model, arguments: argparse.Namespace):
    """A recipe of ours fitted to a mechanism without a warm-up; one from a file stays as it is."""
    from openmsa import hf
    from openmsa.training import fitted

    if arguments.recipe not in RECIPE_NAMES or not hf.is_converted(model):
        return recipe
    made = fitted(recipe, model)
    if made is not recipe:
        say(
            f"{hf.mechanism_of(model)} has no warm-up: every phase trains all, sparse ({made.name})"
        )
    return made


def recall_probe(recipe, model, tokenizer):
    """What measures the index while it trains: its recall on held-out text; None without one."""
    from openmsa import hf
    from openmsa.cli.texts import sequences
    from openmsa.evaluation.recall import probe
    from openmsa.training import read_documents

    if not hf.has_index(model):
        return None
    budget = hf.room_of(model).budget
    longest = max(phase.seq_len for phase in recipe.phases)
    if longest <= budget.tokens:
        say(f"no recall is logged: {longest} tokens fit the budget, every block is kept")
        return None
    texts = read_documents(recipe.data.source, split="heldout", text_column=recipe.data.text_column)
    read = sequences(texts, tokenizer, num_tokens=longest, num_sequences=2)
    return lambda trained: probe(trained, read)


def step_counter(recipe, bar):
    """A callback of the trainer that moves the bar over the steps of all phases."""
    from transformers import TrainerCallback

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            number = int(Path(args.output_dir).name.partition("-")[0])
            before = sum(phase.steps for phase in recipe.phases[:number])
            bar.show(before + state.global_step, sum(phase.steps for phase in recipe.phases))

    return Counter()
