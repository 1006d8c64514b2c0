"""openmsa bench: what this machine gets out of itself, dense and sparse, beside its roofs.

Here bench cpu; bench gpu has files of its own (openmsa.cli.bench_gpu).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from openmsa.cli import bench_gpu
from openmsa.cli.arguments import whole_number, whole_numbers
from openmsa.cli.console import say
from openmsa.cli.door import UsageError
from openmsa.cli.files import check_space

DESCRIPTION = (
    "Measure select, attend, dense attention and decoding on this machine, beside torch's matmul, "
    "memory reads, torch SDPA and transformers' MiniMax-M3; results are checked against fp64 in "
    "the same run. Table and sweep take about ten minutes on two cores of 160 GFLOP/s each (bf16), "
    "less on more, and 8 GB of memory; --quick shows in seconds that everything runs. Leave the "
    "machine alone meanwhile. bench gpu does the same on a GPU in under ten minutes, with cuDNN, "
    "flash, FlexAttention and what else is installed beside it."
)
EXAMPLE = "openmsa bench cpu --suite table --out runs/bench"
SUITES = ("table", "sweep", "workloads", "m3")
BACKENDS = ("portable", "cpu")
TABLE_COLUMNS = ("what", "data", "ours", "against", "ratio", "at least", "met", "right")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", choices=("cpu", "gpu"), help="what is measured")
    parser.add_argument(
        "--suite",
        choices=(*SUITES, "all"),
        help="table: what was promised; sweep: time against context; workloads: shapes that real "
        "systems have seen, about ten minutes more; m3: a MiniMax-M3 layer beside transformers' "
        "own, 2K to 128K tokens, about half an hour more; left out: table and sweep",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, only to see it run")
    parser.add_argument(
        "--context",
        type=whole_numbers,
        metavar="LOW,HIGH",
        help="shortest and longest context in tokens (default: 2048,1048576)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        help="folder for cpu_*.csv or gpu.csv (rows are added to what is there) and the plot",
    )
    parser.add_argument("--threads", type=whole_number(1), help="left out: as torch has it")
    parser.add_argument("--instruction-set", help="of the native kernels; left out: the best")
    parser.add_argument("--backend", choices=BACKENDS, help="left out: what the operations pick")
    bench_gpu.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is a file; name a folder")
    check_space(arguments.out)
    if arguments.device == "gpu":
        return bench_gpu.run(arguments)
    bench_gpu.refuse_for_cpu(arguments)
    from openmsa.accounting import machine

    plan, backend = _plan(arguments), _backend(arguments.backend)
    wanted = {"all": SUITES, None: SUITES[:2]}.get(arguments.suite, (arguments.suite,))
    with _threads(arguments.threads), _instruction_set(backend, arguments.instruction_set) as name:
        say(f"{machine.processor()}; backend {backend}{f' ({name})' if name else ''}")
        bench = _Bench(arguments, plan, backend, name)
        right = [getattr(bench, suite)() for suite in wanted]
    say(f"wrote {arguments.out}")
    return 0 if all(right) and not bench.failed else 1


class _Bench:
    """One run: its suites print, and add their rows to the csv of their name."""

    def __init__(self, arguments, plan, backend: str, instruction_set: str) -> None:
        from openmsa.cli.bench_plan import Run

        self.out: Path = arguments.out
        self.run = Run(plan, backend, instruction_set)
        self.stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.began = time.monotonic()
        self.failed = False
        self.run.warm_up()

    def table(self) -> bool:
        """Rows of docs/design.md; True if every checked result was right."""
        from openmsa.cli import bench_table

        return self._suite("table", self._parts(bench_table))

    def workloads(self) -> bool:
        """Shapes of other people's systems; True if every checked result was right."""
        from openmsa.cli.bench_workloads import measured

        return self._suite("workloads", measured(self.run))

    def m3(self) -> bool:
        """A MiniMax-M3 of one layer beside transformers' paths; True if the results agreed."""
        from openmsa.accounting import m3
        from openmsa.cli.bench_m3 import measured

        if m3.missing():
            say(f"m3 suite left out: {m3.missing()}")
            return True
        return self._suite("m3", measured(self.run))

    def sweep(self) -> bool:
        """Time against context, with the crossovers in words and a plot."""
        from openmsa.accounting import rows
        from openmsa.cli import bench_pictures, bench_sweep

        points = []
        for point in bench_sweep.sweep(self.run):
            points.append(point)
            row = point.row(self.run)
            self._write("sweep", row)
            self._tell(f"{bench_sweep.tokens_text(point.context)} {point.line}, {_words(row)}")
        if not points:
            raise UsageError("no context of the sweep fits the free memory; lower --context")
        _sweep_table(points)
        for line in bench_sweep.crossovers(points):
            print(line)
        try:
            drawn = bench_pictures.draw(rows.read(self._csv("sweep")), self.out / "cpu_sweep")
            say(f"drew {drawn[0]}")
        except ModuleNotFoundError as error:
            say(f"no plot: needs the package {error.name} (pip install 'openmsa[report]')")
        return True

    def _parts(self, bench_table) -> Iterator:
        parts = bench_table.parts(self.run)
        for number, (name, (tokens, measure)) in enumerate(parts.items(), 1):
            why = bench_table.left_out(self.run, tokens, measure)
            self._tell(f"[{number}/{len(parts)}] {name}{f': left out, {why}' if why else ''}")
            if why:
                continue
            try:
                yield from measure(self.run)
            except RuntimeError as error:
                # The parts after it are worth having: a run takes minutes.
                self.failed = True
                self._tell(f"  failed: {error}")

    def _suite(self, suite: str, found: Iterable) -> bool:
        shown, right = [], True
        for row in found:
            self._write(suite, row)
            self._tell(f"  {row.what} ({row.data}): {_words(row)}")
            right = right and (row.verdict is None or row.verdict.ok)
            shown.append(row)
        _print(TABLE_COLUMNS, map(_cells, shown))
        for row in shown:
            told = [_spread(row), row.note, row.verdict.words if row.verdict else ""]
            print(f"{row.what} ({row.data}): {'; '.join(filter(None, told))}")
        return right

    def _tell(self, words: str) -> None:
        say(f"{time.monotonic() - self.began:6.0f} s  {words}")

    def _csv(self, suite: str) -> Path:
        return self.out / f"cpu_{suite}.csv"

    def _write(self, suite: str, row) -> None:
        """Add one row as soon as it is known: a run that is stopped keeps what it measured."""
        from openmsa.accounting.rows import append
        from openmsa.cli.bench_rows import BENCH_COLUMNS, as_csv

        append(self._csv(suite), [as_csv(row, self.run, self.stamp)], BENCH_COLUMNS)


def _plan(arguments: argparse.Namespace):
    from openmsa.cli.bench_plan import FULL, QUICK

    plan = QUICK if arguments.quick else FULL
    if arguments.context is None:
        return plan
    if len(arguments.context) != 2:
        raise UsageError("--context needs two different lengths, as in --context 2048,131072")
    return dataclasses.replace(plan, context=arguments.context, most_tokens=arguments.context[1])


def _backend(asked: str | None) -> str:
    """The backend to measure: what was asked for, or what the operations pick."""
    from openmsa.ops.backend import availability

    usable = availability()
    name = asked or ("cpu" if usable["cpu"] is None else "portable")
    if usable[name] is not None:
        raise UsageError(f"--backend {name} is not usable here: {usable[name]}")
    return name


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _instruction_set(backend: str, asked: str | None) -> Iterator[str]:
    """The instruction set of the native kernels while measuring; empty for other backends."""
    if backend != "cpu":
        if asked:
            raise UsageError(f"--instruction-set belongs to --backend cpu; this is {backend}")
        yield ""
        return
    from openmsa import native

    names = native.instruction_sets()
    if asked and asked not in names:
        raise UsageError(f"--instruction-set {asked} cannot run here; choose {', '.join(names)}")
    with native.instruction_set(asked) if asked else nullcontext():
        yield asked or names[0]


def _words(row) -> str:
    value = f"{row.metric} {_value(row)}"
    if row.ratio is not None:
        value += f", {row.ratio:.3g} of {row.rival}"
    if row.verdict is not None and not row.verdict.ok:
        value += f"; WRONG: {row.verdict.words}"
    return value


def _value(row) -> str:
    """The median, or "never" for a context that was not found."""
    return f"{row.ours[1]:.4g} {row.unit}" if row.ours[1] == row.ours[1] else "never"


def _spread(row) -> str:
    """From the 20th to the 80th percentile of the repeats."""
    if row.repeats < 2:
        return "measured once" if row.repeats else ""
    low, _, high = row.ours
    return f"{row.repeats} repeats, {low:.4g} to {high:.4g} {row.unit}"


def _print(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table as wide as it needs: folded to a narrow terminal, rows of numbers cannot be read."""
    rows = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _cells(row) -> tuple:
    rival = "" if row.rival_value is None else f"{row.rival_value:.4g} "
    return (
        row.what,
        row.data,
        _value(row),
        rival + row.rival.partition(",")[0].partition(" (")[0],
        "" if row.ratio is None else f"{row.ratio:.3g}",
        row.target,
        {True: "yes", False: "no", None: ""}[row.met],
        "" if row.verdict is None else ("yes" if row.verdict.ok else "NO"),
    )


def _sweep_table(points) -> None:
    from openmsa.cli.bench_plan import tokens_text

    lines = list(dict.fromkeys((p.metric, p.line) for p in points))
    values = {(p.metric, p.line, p.context): p for p in points}
    lengths = sorted({p.context for p in points})
    rows = [
        [metric, line, *(_duration(values.get((metric, line, s))) for s in lengths)]
        for metric, line in sorted(lines)
    ]
    _print(("~: extrapolated", "line", *map(tokens_text, lengths)), rows)


def _duration(point) -> str:
    """0.12 ms, 3.4 s, 2.1 h; nothing for what was not measured."""
    if point is None:
        return ""
    seconds = point.times.median
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))
    size, name = next((u for u in units if seconds >= u[0]), units[-1])
    about = "~" if point.note == "extrapolated" else ""
    return f"{about}{seconds / size:.3g} {name}"
