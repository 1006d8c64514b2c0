"""The command line: one file per verb, found by name and imported only when asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

VERBS = {
    "demo": "the whole job on a small model, told on one page (report.html)",
    "convert": "a dense checkpoint becomes MSA, or goes back to dense",
    "train": "warm the index, train sparse, or train from scratch",
    "evaluate": "perplexity by position, retrieval and recall, models side by side",
    "generate": "text from a prompt of any length the model allows",
    "inspect": "what the index selects, and whether a dense model would bear MSA",
    "bench": "what this machine gives: dense, sparse and decoding beside its roofs",
    "conformance": "does an engine mean what the definition means, trap by trap",
    "compare": "every mechanism trained from one model, quality and speed on one page",
    "cost": "what each sparse attention would cost on which chips: FLOPs, bytes, seconds, dollars",
    "env": "which backends are usable here and, for each that is not, why",
}


def overview() -> str:
    """The text of `openmsa --help`."""
    lines = ["usage: openmsa VERB [options]", "", "MiniMax Sparse Attention for every machine.", ""]
    lines += [f"  {verb:13}{what}" for verb, what in VERBS.items()]
    lines += [
        "",
        "`openmsa VERB --help` tells more, with an example.",
        "Exit codes: 0 done, 1 failed, 2 wrong usage.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return 0 (done), 1 (the work failed), 2 (wrong usage) or 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"openmsa {version('openmsa')}")
        return 0
    from openmsa.cli.door import run_verb, wrong_verb

    verb, *rest = arguments
    return run_verb(verb, rest) if verb in VERBS else wrong_verb(verb, VERBS)
