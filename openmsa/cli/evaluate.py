"""openmsa evaluate: perplexity by position, retrieval and recall, models side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from openmsa.cli.arguments import (
    add_model_options,
    add_out_options,
    shares,
    subset_of,
    whole_number,
    whole_numbers,
)
from openmsa.cli.console import progress, say
from openmsa.cli.door import UsageError
from openmsa.cli.files import check_space, check_vacant
from openmsa.cli.models import check_name, load_model, load_tokenizer, short_name
from openmsa.cli.tables import draw, report
from openmsa.cli.texts import documents, sequences
from openmsa.evaluation.plain import write_json

DESCRIPTION = (
    "Judge one model, or several against the first: loss and perplexity by position on text, "
    "retrieval of what was said far back, and (where a model has an index) recall of the index."
)
EXAMPLE = "openmsa evaluate runs/dense runs/msa --context-tokens 2048 --out runs/judged"
WHAT = ("perplexity", "retrieval", "recall")
TASKS = ("passkey", "multi_key", "key_value", "variable_tracking")
RECALL_QUERIES = 256  # per piece of text: beyond that the figures move in the third digit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub names")
    parser.add_argument("--what", type=subset_of(*WHAT), default=",".join(WHAT), help="some of")
    add_out_options(parser, required=False, what="evaluation.json and figures (png, svg)")
    number = whole_number(1)
    text = parser.add_argument_group("perplexity and recall")
    text.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to read; left out: Python's standard library, held-out part",
    )
    text.add_argument("--context-tokens", type=number, default=2048, help="tokens read at a time")
    text.add_argument("--num-sequences", type=number, default=16, help="pieces of text read")
    asked = parser.add_argument_group("retrieval")
    asked.add_argument("--tasks", type=subset_of(*TASKS), default=",".join(TASKS), help="some of")
    asked.add_argument(
        "--lengths", type=whole_numbers, default="256,512,1024", help="contexts in tokens"
    )
    asked.add_argument("--depths", type=shares, default="0,0.25,0.5,0.75,1", help="0 to 1")
    asked.add_argument("--examples", type=number, default=8, help="per task, length and depth")
    asked.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--batch-size", type=number, default=4, help="sequences at a time")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.out:
        check_vacant(arguments.out, overwrite=arguments.overwrite)
        check_space(arguments.out)
    for source in arguments.models:
        check_name(source)
    texts = documents(arguments.text)
    tokenizer = shared_tokenizer(arguments.models)
    found: dict[str, dict] = {what: {} for what in arguments.what}
    for name, source in zip(distinct_names(arguments.models), arguments.models):
        model = load_model(source, device=arguments.device, dtype=arguments.dtype)
        for what in arguments.what:
            result = MEASURES[what](name, model, tokenizer, texts, arguments)
            if result is not None:
                found[what][name] = result
    told = {what: report(what, results) for what, results in found.items() if results}
    if arguments.out:
        write_json(arguments.out / "evaluation.json", {"models": arguments.models, **told})
        draw(found, arguments.out)
        say(f"wrote {arguments.out}")


def perplexity(name: str, model, tokenizer, texts: list[str], arguments: argparse.Namespace):
    """Losses by position over pieces of the text."""
    from openmsa.evaluation.perplexity import position_loss

    read = pieces(tokenizer, texts, arguments)
    with progress(f"{name}: perplexity", len(read)) as bar:
        return position_loss(model, read, batch_size=arguments.batch_size, progress=bar.show)


def retrieval(name: str, model, tokenizer, texts: list[str], arguments: argparse.Namespace):
    """Right answers over length and depth; the text is the filler."""
    from openmsa.evaluation.retrieval import RetrievalPlan, evaluate_retrieval

    plan = RetrievalPlan(
        filler="\n".join(texts),
        tasks=arguments.tasks,
        context_tokens=arguments.lengths,
        depths=arguments.depths,
        examples_per_cell=arguments.examples,
        seed=arguments.seed,
    )
    size = arguments.batch_size
    with progress(f"{name}: retrieval") as bar:
        return evaluate_retrieval(model, tokenizer, plan, batch_size=size, progress=bar.show)


def recall(name: str, model, tokenizer, texts: list[str], arguments: argparse.Namespace):
    """Recall of a model's index; None for a dense model and for mechanisms that have none."""
    from openmsa import hf
    from openmsa.evaluation.recall import evaluate_recall

    if not hf.has_index(model):
        return None
    read = pieces(tokenizer, texts, arguments)
    with progress(f"{name}: recall", len(read)) as bar:
        return evaluate_recall(
            model,
            read,
            max_queries=RECALL_QUERIES,
            batch_size=arguments.batch_size,
            progress=bar.show,
        )


MEASURES = {"perplexity": perplexity, "retrieval": retrieval, "recall": recall}


def pieces(tokenizer, texts: list[str], arguments: argparse.Namespace) -> list:
    """The same pieces of text for every model."""
    return sequences(
        texts,
        tokenizer,
        num_tokens=arguments.context_tokens,
        num_sequences=arguments.num_sequences,
    )


def shared_tokenizer(sources: list[str]):
    """The tokenizer of all models. Raises UsageError where they cut text differently."""
    first, *others = [load_tokenizer(source) for source in sources]
    for source, other in zip(sources[1:], others):
        if other.get_vocab() != first.get_vocab():
            raise UsageError(
                f"{source} and {sources[0]} have different tokens, so their losses per token "
                "cannot be compared; evaluate them apart"
            )
    return first


def distinct_names(sources: list[str]) -> list[str]:
    """Short names for tables; whole ones, and then numbers, where two would be the same."""
    names = [short_name(source) for source in sources]
    if len(set(names)) < len(names):
        names = list(sources)
    seen = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({again + 1})" if again else name for name, again in zip(names, seen)]
