"""Text that the verbs measure on: the user's files, or the held-out standard library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openmsa.cli.door import UsageError


def documents(paths: Sequence[Path]) -> list[str]:
    """The text of every file, or without files what no built-in recipe trains on.

    Raises UsageError for missing, binary and empty files.
    """
    if not paths:
        from openmsa.training import standard_library_text

        return standard_library_text("heldout")
    return [_read(path) for path in paths]


def sequences(texts: Sequence[str], tokenizer, *, num_tokens: int, num_sequences: int) -> list:
    """Pieces of `num_tokens` tokens, int64 [num_tokens], spread evenly over the texts.

    Fewer than `num_sequences` where the texts are too short for more. Raises UsageError where not
    even one piece can be cut.
    """
    from openmsa.training.data import token_row

    row = token_row(texts, tokenizer)
    pieces = len(row) // num_tokens
    if pieces == 0:
        raise UsageError(
            f"the text has {len(row)} tokens, fewer than --context-tokens {num_tokens}; "
            "give more text, or a shorter context"
        )
    taken = min(pieces, num_sequences)
    starts = [number * pieces // taken * num_tokens for number in range(taken)]
    return [row[start : start + num_tokens].long() for start in starts]


def _read(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    if not text.strip():
        raise UsageError(f"{path} is empty; give text to read")
    return text
