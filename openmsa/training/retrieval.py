"""Retrieval tasks, generated from a seed: something said early has to be said again at the end.

Each task is a list of lines `@name = value` laid into a filler text, and a last line that repeats a
name. What follows can only be found by reading far back.

    passkey             one line in the filler
    multi_key           eight lines in the filler, one of them asked for
    key_value           no filler at all: every line is a pair, so every block looks alike
    variable_tracking   three lines that form a chain; all its links are asked for, one hop each

The same generator makes training documents (many questions, answers learned) and test examples
(one question). The tasks follow the families of RULER (arXiv 2404.06654) at the scale of a small
model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

TASKS = ("passkey", "multi_key", "key_value", "variable_tracking")
NEEDLES_PER_TASK = {"passkey": 1, "multi_key": 8, "variable_tracking": 3}
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class RetrievalExample:
    """A question about a long context. `prompt + answer` is at most `context_tokens` long."""

    task: str
    prompt: str
    answer: str
    depth: float
    context_tokens: int


@dataclass(frozen=True)
class Piece:
    """A run of text, and whether a language model should learn to predict it."""

    text: str
    learned: bool


def make_example(
    task: str,
    *,
    context_tokens: int,
    depth: float,
    seed: int,
    filler: str,
    encode: Encode | None = None,
) -> RetrievalExample:
    """Make one test example: the asked line stands at `depth` (0 = start, 1 = end) of the context.

    task: one of `TASKS`. context_tokens: length of prompt and answer together, in tokens of
    `encode`, exactly so for bytes (encode None), so that examples need no padding in a batch.
    filler: any text, of which a stretch is taken by the seed. The same arguments always give the
    same example. Raises ValueError for an unknown task, a depth outside [0, 1], an empty filler or
    a context too short to hold the lines.
    """
    _check(task, depth, filler)
    length = _length_of(encode)
    rng = random.Random(f"{task}:{context_tokens}:{depth}:{seed}")
    lines, asked, question, answer = _needles(task, rng, context_tokens, length)
    room = context_tokens - length(question + answer) - sum(length(line) for line in lines)
    if room < 0:
        raise ValueError(
            f"context_tokens={context_tokens} cannot hold the {len(lines)} lines of task {task!r}; "
            f"give at least {context_tokens - room}"
        )
    taken = [] if task == "key_value" else _filler_lines(rng, filler, room, length)
    text = "".join(_lay(rng, lines, asked, depth, taken, length)) + question
    front = _cut_line(filler, context_tokens - length(text + answer), length)
    return RetrievalExample(task, front + text, answer, depth, context_tokens)


def make_document(
    task: str, *, tokens: int, seed: int | str, filler: str, encode: Encode | None = None
) -> list[Piece]:
    """Make one training document of at most `tokens` tokens, as pieces that are learned or not.

    Names and values that nobody could foresee are not learned; filler and answers are. A document
    asks many questions: `key_value` repeats earlier pairs all along, the others ask at the end.
    Arguments as in `make_example`.
    """
    _check(task, 0.0, filler)
    length = _length_of(encode)
    rng = random.Random(f"document:{task}:{tokens}:{seed}")
    if task == "key_value":
        return _key_value_stream(rng, tokens, length)
    chains = [_needles(task, rng, tokens, length) for _ in range(rng.randint(1, 4))]
    if task == "passkey":
        chains = chains[:1]
    asks = [(question, answer) for _, _, question, answer in chains]
    if task == "multi_key":
        asks += [_split_line(rng.choice(lines)) for lines, *_ in chains for _ in range(3)]
    lines = [line for chain_lines, *_ in chains for line in chain_lines]
    room = tokens - sum(length(line) for line in lines)
    room -= sum(length(question + answer) + 1 for question, answer in asks)
    while room < 0:
        room += length(lines.pop()) if len(asks) == 1 else length("".join(asks.pop())) + 1
    laid = _lay(rng, lines, 0, rng.random(), _filler_lines(rng, filler, room, length), length)
    pieces = [Piece(text, not text.startswith("@")) for text in laid]
    for question, answer in asks:
        pieces += [Piece(question, False), Piece(answer, True), Piece("\n", True)]
    return pieces


def _check(task: str, depth: float, filler: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known; choose one of {', '.join(TASKS)}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie in [0, 1]: 0 is the start of the context")
    if not filler.strip():
        raise ValueError("filler is empty; give a text of at least a few lines")


def _length_of(encode: Encode | None) -> Callable[[str], int]:
    if encode is None:
        return lambda text: len(text.encode())
    return lambda text: len(encode(text))


def _name(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4))


def _value(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=4))


def _split_line(line: str) -> tuple[str, str]:
    name, value = line.rstrip("\n").split(" = ")
    return f"{name} = ", value


def _needles(
    task: str, rng: random.Random, context_tokens: int, length: Callable[[str], int]
) -> tuple[list[str], int, str, str]:
    """The lines to lay into the context, the number of the asked one, the question, the answer."""
    if task == "variable_tracking":
        names = [_value(rng), *(_name(rng) for _ in range(3))]
        lines = [f"@{a} = @{b}\n" for a, b in pairwise(names)]
        return lines, 0, f"@{names[0]} = ", " = ".join(f"@{name}" for name in names[1:])
    if task == "passkey":
        lines = [f"@pass = {_value(rng)}\n"]
    else:
        count = NEEDLES_PER_TASK.get(task)
        line_tokens = length(f"@{_name(rng)} = {_value(rng)}\n")
        count = count or max(1, context_tokens // line_tokens - 1)
        names = list(dict.fromkeys(_name(rng) for _ in range(count)))
        lines = [f"@{name} = {_value(rng)}\n" for name in names]
    asked = rng.randrange(len(lines))
    return lines, asked, *_split_line(lines[asked])


def _filler_lines(
    rng: random.Random, filler: str, room: int, length: Callable[[str], int]
) -> list[str]:
    """Whole lines of `filler` from a random place, at most `room` tokens of them."""
    lines = [line for line in filler.splitlines(keepends=True) if not line.startswith("@")]
    first = rng.randrange(len(lines))
    taken: list[str] = []
    for number in range(len(lines) * (1 + room // max(1, len(filler) // 4))):
        line = lines[(first + number) % len(lines)]
        line = line if line.endswith("\n") else line + "\n"
        room -= length(line)
        if room < 0:
            break
        taken.append(line)
    return taken


def _cut_line(filler: str, room: int, length: Callable[[str], int]) -> str:
    """One line of at most `room` tokens that starts as some line of `filler` does."""
    if room <= 0:
        return ""
    words = max(filler.splitlines(), key=len)
    line = "#" * room if len(words) < room else words[:room].encode("ascii", "replace").decode()
    while line and length(line[:-1] + "\n") > room:
        line = line[:-1]
    return line[:-1] + "\n"


def _lay(
    rng: random.Random,
    lines: list[str],
    asked: int,
    depth: float,
    filler: list[str],
    length: Callable[[str], int],
) -> list[str]:
    """Spread `lines` over the filler, the asked one at `depth` of the whole."""
    if not filler:
        others = [line for number, line in enumerate(lines) if number != asked]
        others.insert(round(depth * len(others)), lines[asked])
        return others
    total = sum(length(line) for line in filler)
    places = [(depth, 0, lines[asked])]
    chain = lines[asked + 1 :] if lines[asked].count("@") == 2 else None
    if chain is not None:
        steps = sorted(rng.uniform(depth, 1) for _ in chain)
        places += [
            (at, 1 + rank, line) for rank, (at, line) in enumerate(zip(steps, chain, strict=True))
        ]
    else:
        others = (line for number, line in enumerate(lines) if number != asked)
        places += [(rng.random(), 1, line) for line in others]
    places.sort()
    laid, passed = [], 0
    for line in filler:
        while places and passed >= places[0][0] * total:
            laid.append(places.pop(0)[2])
        laid.append(line)
        passed += length(line)
    return laid + [line for _, _, line in places]


def _key_value_stream(rng: random.Random, tokens: int, length: Callable[[str], int]) -> list[Piece]:
    """Pairs, about half of them repeated later; a repeated value is an answer to learn."""
    pieces: list[Piece] = []
    known: dict[str, str] = {}
    new_share = rng.choice((0.3, 0.5, 0.8))
    while tokens > 0:
        fresh = not known or rng.random() < new_share
        name = _name(rng) if fresh else rng.choice(list(known))
        fresh = name not in known
        value = known.setdefault(name, _value(rng))
        tokens -= length(f"@{name} = {value}\n")
        if tokens >= 0:
            pieces += [Piece(f"@{name} = ", False), Piece(value, not fresh), Piece("\n", not fresh)]
    return pieces
