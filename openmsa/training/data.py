"""Text to sequences of tokens: documents, one long row of tokens, and a mixture drawn by number.

Sequence number i of a mixture is a pure function of (seed, i). Resuming needs no data state: it
starts at the next number.
"""

from __future__ import annotations

import json
import random
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from openmsa.training.retrieval import TASKS, Piece, make_document

HELDOUT_SHARE = 0.05
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".hpp", ".cu", ".java", ".js"}
TEXT_SUFFIXES |= {".ts", ".go", ".rs", ".rb", ".sh", ".html", ".css", ".toml", ".yaml", ".yml"}
TABLE_SUFFIXES = {".jsonl", ".parquet"}
FILLER_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    source: "stdlib" (the sources of the running Python's standard library) or a path: a text file,
    a folder of text or source code, a .jsonl or .parquet file, or a folder written by
    `datasets.Dataset.save_to_disk`. text_column: the column of a table that holds the text.
    retrieval_share: share of sequences that are generated retrieval documents.
    tasks: which of `openmsa.training.retrieval.TASKS` those are.
    """

    source: str = "stdlib"
    text_column: str = "text"
    retrieval_share: float = 0.3
    tasks: tuple[str, ...] = TASKS

    def __post_init__(self) -> None:
        if not 0 <= self.retrieval_share <= 1:
            raise ValueError(f"retrieval_share={self.retrieval_share} must lie in [0, 1]")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks={self.tasks} must be some of {', '.join(TASKS)}")
        object.__setattr__(self, "tasks", tuple(self.tasks))


def standard_library_text(split: str = "train") -> list[str]:
    """The .py files of the running interpreter's standard library, without its tests.

    split: "train" or "heldout" (one file in twenty, chosen by its name, so that both stay the same
    from run to run). Returns the documents in the order of their paths.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(
        path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)
    )
    if not files:
        raise ValueError(
            f"source='stdlib': no .py files under {root}; name a file or folder instead"
        )
    named = ((path.relative_to(root).as_posix(), path) for path in files)
    texts = [(name, path.read_text(encoding="utf-8", errors="replace")) for name, path in named]
    return split_documents(texts, split)


def read_documents(source: str, *, split: str = "train", text_column: str = "text") -> list[str]:
    """Read the documents that `DataConfig.source` names; arguments as there.

    Raises ValueError if the path does not exist, holds no text, or lacks the column.
    """
    if source == "stdlib":
        return standard_library_text(split)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"source={source!r} does not exist; give 'stdlib', a file or a folder")
    documents = [item for item in _read(path, text_column) if item[1].strip()]
    if not documents:
        raise ValueError(f"source={source!r} holds no text (read: {_readable()})")
    return split_documents(documents, split)


def split_documents(documents: Sequence[tuple[str, str]], split: str) -> list[str]:
    """Take the train or the held-out part of named documents; a single one is cut in two."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
    if len(documents) < 2 / HELDOUT_SHARE:
        text = "\n".join(text for _, text in documents)
        cut = int(len(text) * (1 - HELDOUT_SHARE))
        return [text[:cut] if split == "train" else text[cut:]]
    order = {name: zlib.crc32(name.encode()) % 1000 for name, _ in documents}
    heldout = {name for name, rank in order.items() if rank < 1000 * HELDOUT_SHARE}
    heldout = heldout or {min(order, key=lambda name: (order[name], name))}
    return [text for name, text in documents if (name in heldout) == (split == "heldout")]


def _readable() -> str:
    return ", ".join(sorted(TEXT_SUFFIXES | TABLE_SUFFIXES)) + ", folders of these, saved datasets"


def _read(path: Path, text_column: str) -> Iterator[tuple[str, str]]:
    if path.is_dir() and (path / "dataset_info.json").exists():
        from datasets import load_from_disk

        yield from _column(load_from_disk(str(path)), text_column, path)
    elif path.is_dir():
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            if file.suffix.lower() in TEXT_SUFFIXES | TABLE_SUFFIXES:
                inside = _read(file, text_column)
                yield from ((name.removeprefix(f"{path}/"), text) for name, text in inside)
    elif path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        rows = table.to_pydict() if text_column in table.column_names else table.column_names
        yield from _column(rows, text_column, path)
    elif path.suffix.lower() == ".jsonl":
        yield from _json_lines(path, text_column)
    else:
        yield str(path), path.read_text(encoding="utf-8", errors="replace")


def _column(table, text_column: str, path: Path) -> Iterator[tuple[str, str]]:
    names = getattr(table, "column_names", list(table))
    if text_column not in names:
        raise ValueError(
            f"text_column={text_column!r} is not in {path}; its columns are {', '.join(names)}"
        )
    for number, text in enumerate(table[text_column]):
        yield f"{path}:{number}", str(text)


def _json_lines(path: Path, text_column: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or text_column not in row:
            raise ValueError(f"text_column={text_column!r} is missing in {path}, line {number}")
        yield f"{path}:{number}", str(row[text_column])


def encoder(tokenizer):
    """The function text -> token numbers, without special tokens."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def token_row(documents: Sequence[str], tokenizer) -> Tensor:
    """All documents as one row of tokens, int32 [n], an end-of-text token after each.

    The last two rows are kept, since every phase of a run asks for the same one: not to be written.
    """
    return _token_row(tuple(documents), tokenizer, tokenizer.eos_token_id)


@lru_cache(maxsize=2)
def _token_row(documents: tuple[str, ...], tokenizer, end: int | None) -> Tensor:
    encode = encoder(tokenizer)
    rows: list[Tensor] = []
    for text in documents:
        ids = encode(text) + ([] if end is None else [end])
        rows.append(torch.tensor(ids, dtype=torch.int32))
    return torch.cat(rows)


class Mixture(torch.utils.data.Dataset):
    """Sequences of exactly `seq_len` tokens: stretches of text, and retrieval documents among them.

    Item i is {"input_ids": int64 [seq_len], "labels": int64 [seq_len]}, labels -100 where a token
    is not to be learned, and depends on `seed` and i alone.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer,
        *,
        seq_len: int,
        size: int,
        seed: int,
        split: str = "train",
    ):
        self.config, self.seq_len, self.size, self.seed = config, seq_len, size, seed
        self.documents = read_documents(config.source, split=split, text_column=config.text_column)
        self.encode = encoder(tokenizer)
        self.row = token_row(self.documents, tokenizer)
        if len(self.row) <= seq_len:
            raise ValueError(
                f"source={config.source!r} has {len(self.row)} tokens in split {split!r}, too few "
                f"for one sequence of seq_len={seq_len}; give more text or a shorter seq_len"
            )
        self.text = "\n".join(self.documents)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rng = random.Random(f"{self.seed}:{number}")
        if rng.random() < self.config.retrieval_share:
            return self._retrieval(rng)
        start = rng.randrange(len(self.row) - self.seq_len)
        ids = self.row[start : start + self.seq_len].long()
        return {"input_ids": ids, "labels": ids.clone()}

    def _retrieval(self, rng: random.Random) -> dict[str, Tensor]:
        task = rng.choice(self.config.tasks)
        span = FILLER_CHARACTERS_PER_TOKEN * self.seq_len
        start = rng.randrange(max(1, len(self.text) - span))
        filler = self.text[start : start + span]
        pieces = make_document(
            task, tokens=self.seq_len, seed=rng.random(), filler=filler, encode=self.encode
        )
        return self._tokens(pieces, rng)

    def _tokens(self, pieces: list[Piece], rng: random.Random) -> dict[str, Tensor]:
        """Encode the pieces; what is missing to `seq_len` is filled with text in front."""
        ids: list[int] = []
        labels: list[int] = []
        for piece in pieces:
            encoded = self.encode(piece.text)
            ids += encoded
            labels += encoded if piece.learned else [-100] * len(encoded)
        missing = self.seq_len - len(ids)
        start = rng.randrange(len(self.row) - self.seq_len)
        front = self.row[start : start + max(0, missing)].tolist()
        ids, labels = (front + ids)[-self.seq_len :], (front + labels)[-self.seq_len :]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
