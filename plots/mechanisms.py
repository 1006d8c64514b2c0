"""docs/mechanisms: a page per mechanism from its header and its numbers, and a table of all.

    python plots/mechanisms.py

What a page says is said in openmsa/mechanisms/<name>.py; errors are rows of
benchmarks/results/mechanisms.csv, which benchmarks/mechanisms.py writes.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import re
from pathlib import Path

from openmsa.evaluation.headers import FACTS, MECHANISMS, facts_of, header_of, title_of

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "mechanisms"
CSV = ROOT / "benchmarks" / "results" / "mechanisms.csv"
MADE = "<!-- made by plots/mechanisms.py; change openmsa/mechanisms/{name}.py instead -->"
INTRODUCTION = """\
Seven ways to attend, each one file of `openmsa/mechanisms` with the same headings; all of them work
in `openmsa convert`, training, packed and padded batches, caches and `generate`. Side by side in
numbers: [compare.md](../compare.md)."""
CHECKED = """\
The largest difference that the tests saw between numbers of ours and theirs, over outputs and
gradients, in fp32 unless said otherwise; chosen blocks and tokens must be the same. The rows are
`benchmarks/results/mechanisms.csv`; `benchmarks/mechanisms.py` runs the tests and writes them.
Where no public code runs on a CPU (InfLLM-V2), or none is needed (dense), it is the definition
written out once more, without anything of ours.
Beside this, `tests/mechanisms` holds every mechanism to its own equations and to common laws:
keeping everything equals dense, the future cannot be read, decoding equals the full pass."""
ENTRIES = {
    "dense": "dense_attention",
    "window": "window.windowed_attention",
    "moba": "moba.moba_attention",
    "infllm2": "infllm2.infllm2_attention",
    "nsa": "nsa.nsa_attention",
    "dsa": "dsa.dsa_attention",
    "msa": "msa.msa_attention",
}


def pages() -> dict[str, str]:
    """{file name: text}: the pages and README.md, their index."""
    truths = list(csv.DictReader(CSV.read_text(encoding="utf-8").splitlines()))
    made = {f"{name}.md": page(name, truths) for name in MECHANISMS}
    return {"README.md": index(truths), **made}


def page(name: str, truths: list[dict]) -> str:
    """The page of one mechanism."""
    parts = [f"# {title_of(name)}", MADE.format(name=name), *body(name)]
    parts += ["## Numbers", *numbers(name), "## Checked against", checked(name, truths)]
    parts += ["## Use", use(name), f"Source: [`openmsa/mechanisms/{name}.py`]({source(name)}). "
              "All mechanisms: [README.md](README.md)."]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def body(name: str) -> list[str]:
    """The header's paragraphs: equations as they stand, the facts as a list, the rest as text."""
    first, *paragraphs = header_of(name).strip().split("\n\n")
    found = []
    for paragraph in paragraphs:
        if paragraph.startswith(f"{FACTS[0]}:"):
            told = facts_of(name).items()
            found += ["\n".join(f"- **{fact}:** {escaped(text)}" for fact, text in told)]
        elif is_equations(paragraph):
            found += [f"```text\n{paragraph}\n```"]
        else:
            found += [escaped(paragraph)]
    letters = re.search(r",((?: equations \d+ to \d+)? in our letters.*)", " ".join(first.split()))
    if letters:
        found.insert(0, letters[1].strip().rstrip(".").capitalize() + ":")
    return found


def is_equations(paragraph: str) -> bool:
    """Its first line gives a symbol with an index, or the loss, a value."""
    return re.match(r"\w+(\[[^\]]*\])? += ", paragraph) is not None


def escaped(text: str) -> str:
    """Text without what markdown would take for its own."""
    text = re.sub(r"(?<!`)\b(\w+\[[^\]]*\])", r"`\1`", text)
    return re.sub(r"(?<![`\w.*/])(\*?\w*_\w+(?:\.py|=\w+)?)(?![`\w])", r"`\1`", text)


def config_of(name: str):
    """The config class of a mechanism."""
    module = importlib.import_module(f"openmsa.mechanisms.{name}")
    (found,) = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__name__.endswith("Config")
    ]
    return found


def numbers(name: str) -> list[str]:
    """The fields of its config with their defaults, and the docstring that explains them."""
    kind = config_of(name)
    told = [escaped(" ".join(p.split())) for p in kind.__doc__.strip().split("\n\n")]
    fields = [f"| `{f.name}` | `{f.default!r}` |" for f in dataclasses.fields(kind)]
    if not fields:
        return told
    return [f"`{kind.__name__}`. " + told[0], *told[1:],
            "\n".join(["| number | default |", "|---|---|", *fields])]  # fmt: skip


def checked(name: str, truths: list[dict]) -> str:
    """What its tests hold it against, with versions and the largest difference seen."""
    rows = [
        f"| {row['against']} | {row['version']} | {row['kind']} | {row['largest_difference']} | "
        f"`{row['test'].split(',')[0]}` |"
        for row in truths
        if row["mechanism"] == name
    ]
    head = ["| held against | version | what that is | largest difference | test |",
            "|---|---|---|---|---|"]  # fmt: skip
    return "\n".join([*head, *rows])


def use(name: str) -> str:
    """How it is called."""
    module, _, call = ENTRIES[name].rpartition(".")
    if not module:
        return f"```python\nfrom openmsa import {call}\n```"
    kind = config_of(name).__name__
    return (
        "```python\n"
        f"from openmsa import hf\nfrom openmsa.mechanisms.{module} import {kind}, {call}\n\n"
        f"hf.convert(model, {kind}())  # a transformers model, in place; numbers as above\n```\n\n"
        f"`{call}` is one call for your own layer. On the command line: "
        f"`openmsa convert MODEL --out FOLDER --mechanism {name}`."
    )


def source(name: str) -> str:
    """Where its file is, seen from docs/mechanisms."""
    return f"../../openmsa/mechanisms/{name}.py"


def index(truths: list[dict]) -> str:
    """A table of all mechanisms, and one of what they were held against."""
    facts = {name: facts_of(name) for name in MECHANISMS}
    head = ["", *(fact.lower() for fact in FACTS)]
    table = [row_of(head), row_of(["---"] * len(head))]
    for name in MECHANISMS:
        cells = [escaped(facts[name][fact]) for fact in FACTS]
        table.append(row_of([f"[{name}]({name}.md)", *cells]))
    held = [row_of(["", "held against", "version", "what that is", "largest difference"]),
            row_of(["---"] * 5)]  # fmt: skip
    for row in truths:
        cells = [row[n] for n in ("mechanism", "against", "version", "kind", "largest_difference")]
        held.append(row_of(cells))
    parts = ["# The mechanisms", MADE.format(name="<name>"), INTRODUCTION, "\n".join(table)]
    parts += ["## What they were checked against", CHECKED, "\n".join(held)]
    return "\n\n".join(parts) + "\n"


def row_of(cells) -> str:
    """A line of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
