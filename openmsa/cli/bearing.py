"""Will a dense model bear a budget? Asked by inspect, and by convert --layers auto."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from openmsa.cli.arguments import whole_number
from openmsa.cli.console import progress, table
from openmsa.cli.door import UsageError
from openmsa.cli.texts import documents, sequences

if TYPE_CHECKING:
    from openmsa import MSAConfig
    from openmsa.evaluation.inspection import Bearing
    from openmsa.hf.room import Budget


def add_bearing_options(parser: argparse.ArgumentParser) -> None:
    """What is read to judge, and how strictly."""
    number = whole_number(1)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to read; left out: Python's standard library, held-out part",
    )
    parser.add_argument(
        "--context-tokens", type=number, help="tokens read at a time; left out: 4 budgets, or all"
    )
    parser.add_argument("--num-sequences", type=number, default=4, help="pieces of text read")
    parser.add_argument(
        "--threshold", type=float, default=0.8, help="share of attention that must be captured"
    )


def judged(model, tokenizer, config: MSAConfig, arguments: argparse.Namespace) -> Bearing:
    """The bearing report of a dense model at a budget, printed and returned."""
    from openmsa.evaluation.inspection import will_it_bear
    from openmsa.hf.rooms import room_for

    if not 0 < arguments.threshold <= 1:
        raise UsageError(f"--threshold {arguments.threshold} must be above 0 and at most 1")
    read = pieces(model, tokenizer, room_for(config).budget, arguments)
    with progress("judging the layers"):
        bearing = will_it_bear(model, read, config, threshold=arguments.threshold)
    columns = ("layer", "best blocks", "derived index", "score recall", "block recall", "verdict")
    names = ("layer", "oracle_mass", "captured_mass", "score_recall", "block_recall", "verdict")
    rows = [[row[name] for name in names] for row in bearing.rows()]
    table(f"Attention captured by {config.top_k} x {config.block_size} tokens", columns, rows)
    return bearing


def pieces(model, tokenizer, budget: Budget, arguments: argparse.Namespace) -> list:
    """Pieces of text longer than the budget, as long as asked or as the model allows."""
    kept = budget.tokens
    limit = getattr(model.config, "max_position_embeddings", None) or 4 * kept
    num_tokens = arguments.context_tokens or min(4 * kept, limit)
    if num_tokens > limit:
        raise UsageError(f"--context-tokens {num_tokens}: the model has {limit} positions")
    if num_tokens <= kept:
        raise UsageError(
            f"{num_tokens} tokens at a time fit the budget of {budget.top_k} x "
            f"{budget.block_size}, so every block is kept; lower --top-k or --block-size"
        )
    return sequences(
        documents(arguments.text),
        tokenizer,
        num_tokens=num_tokens,
        num_sequences=arguments.num_sequences,
    )
