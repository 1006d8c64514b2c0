"""Everything `openmsa cost` has to tell, as one value; written as csv, json and a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openmsa.accounting import cost, layer_cost
from openmsa.accounting.chips import Chip
from openmsa.accounting.cost import Estimate
from openmsa.accounting.designs import MSA, Dense
from openmsa.accounting.layer_cost import Assumptions
from openmsa.accounting.shapes import Shape
from openmsa.cli.console import say

NATURE = "FLOPs, bytes and cache are counted; seconds and dollars are estimates, not measurements"


@dataclass(frozen=True)
class Equation12:
    """The paper's own count of one layer: what is quadratic by half, the budget in full."""

    break_even_tokens: float
    against_dense: dict[int, float]


@dataclass(frozen=True)
class Report:
    """break_even: by mechanism, the context from which it is cheaper; None: nowhere up to 1M."""

    shape: Shape
    chip: Chip
    designs: dict[str, Dense]
    given: Assumptions
    estimates: tuple[Estimate, ...]
    break_even_flops: dict[str, int | None]
    break_even_bytes: dict[str, int | None]
    equation_12: Equation12 | None
    command: str


def make(
    shape: Shape,
    chip: Chip,
    designs: Mapping[str, Dense],
    contexts: Sequence[int],
    given: Assumptions,
    command: str = "",
) -> Report:
    """Count and estimate everything for these mechanisms and contexts."""
    sparse = {name: design for name, design in designs.items() if type(design) is not Dense}
    even = {
        of: {name: layer_cost.break_even(x, shape, given, of=of) for name, x in sparse.items()}
        for of in ("flops", "bytes")
    }
    return Report(
        shape=shape,
        chip=chip,
        designs=dict(designs),
        given=given,
        estimates=tuple(estimates(shape, chip, designs, contexts, given)),
        break_even_flops=even["flops"],
        break_even_bytes=even["bytes"],
        equation_12=_equation_12(shape, designs.get("msa"), contexts),
        command=command,
    )


def estimates(
    shape: Shape,
    chip: Chip,
    designs: Mapping[str, Dense],
    contexts: Sequence[int],
    given: Assumptions,
) -> Iterator[Estimate]:
    """Of every mechanism at every context, on as many chips as the hungriest needs there."""
    for s in contexts:
        fewest = cost.chips_needed(designs.values(), shape, chip, s, given)
        for name, design in designs.items():
            yield cost.estimate(name, design, shape, chip, s, given.chips or fewest, given)


def write(report: Report, folder: Path) -> list[Path]:
    """cost.csv, cost.json and, where matplotlib is, cost.svg and cost.png."""
    from openmsa.evaluation.plain import write_json, write_whole

    found = [
        write_whole(folder / "cost.csv", _csv(report)),
        write_json(folder / "cost.json", _plain(report)),
    ]
    try:
        from openmsa.cli import cost_pictures

        found += cost_pictures.draw(report, folder / "cost")
    except ModuleNotFoundError as error:
        say(f"no plot: needs the package {error.name} (pip install 'openmsa[report]')")
    return found


def _equation_12(shape: Shape, msa: Dense | None, contexts: Sequence[int]) -> Equation12 | None:
    if not isinstance(msa, MSA) or shape.latent:
        return None
    pairs = {s: layer_cost.paper_flops(shape, s, msa) for s in contexts}
    ratios = {s: dense / sparse for s, (dense, sparse) in pairs.items()}
    return Equation12(layer_cost.paper_break_even(shape, msa), ratios)


def _csv(report: Report) -> str:
    """A line per mechanism and context, with all that it rests on."""
    common = {
        "model": report.shape.name,
        "chip": report.chip.name,
        **{f"assumed_{k}": v for k, v in dataclasses.asdict(report.given).items() if k != "chips"},
        "nature": NATURE,
        "command": report.command,
    }
    text = io.StringIO()
    names = [f.name for f in dataclasses.fields(Estimate)]
    writer = csv.DictWriter(text, [*list(common)[:2], *names, *list(common)[2:]])
    writer.writeheader()
    for found in report.estimates:
        writer.writerow({**common, **dataclasses.asdict(found)})
    return text.getvalue()


def _plain(report: Report) -> dict:
    """The report as json holds it: mechanisms with their sources, and what is counted said."""
    mechanisms = {
        name: {**dataclasses.asdict(design), "source": design.source}
        for name, design in report.designs.items()
    }
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(Report)}
    return {"nature": NATURE, **fields, "designs": mechanisms}
