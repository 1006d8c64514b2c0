"""openmsa bench gpu: one GPU in under ten minutes, each failure a row and no end of the run."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from openmsa.cli.arguments import subset_of, whole_number
from openmsa.cli.console import say
from openmsa.cli.door import UsageError

PARTS = ("check", "select", "attend", "loss", "prefill", "decode", "layer", "workloads", "peers")
MINUTES, TABLE_SECONDS = 10, 15
COLUMNS = ("what", "dtype", "ours", "least", "against", "ratio", "goal", "met", "right", "peak")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What bench gpu alone takes."""
    group = parser.add_argument_group("bench gpu")
    group.add_argument(
        "--minutes", type=whole_number(1), help="what does not fit is left out (default: 10)"
    )
    group.add_argument("--parts", type=subset_of(*PARTS), help=f"some of {', '.join(PARTS)}")
    group.add_argument("--resume", help=argparse.SUPPRESS)  # RUN@STEP: after a lost GPU


def refuse_for_cpu(arguments: argparse.Namespace) -> None:
    """Raise UsageError for what bench gpu alone takes."""
    for name in ("minutes", "parts", "resume"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} belongs to bench gpu")


def run(arguments: argparse.Namespace) -> int:
    """0: measured and right; 1: something of ours failed or was wrong. A rival that is missing and
    what the minutes did not allow are told in rows, and are no failure.
    """
    from openmsa.ops import gpu

    for name in ("suite", "context", "threads", "instruction_set", "backend"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} belongs to bench cpu")
    if (why := gpu.unavailable()) is not None:
        raise UsageError(
            f"bench gpu cannot run here: {why}; on a machine without a GPU, "
            "TRITON_INTERPRET=1 openmsa bench gpu --quick rehearses it"
        )
    if gpu.interpreted() and not arguments.quick:
        raise UsageError("under Triton's interpreter full shapes take days; add --quick")
    bench = _Bench(arguments)
    bench.measure()
    return bench.finish()


class _Bench:
    """One run: what is left of its minutes, and its rows, which are kept as soon as they are known.

    A GPU that an illegal access has spoilt is given up with its process: a fresh one takes over
    from the next step, under the same stamp.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from openmsa.cli.bench_gpu_plan import FULL, QUICK, GpuRun

        self.arguments, self.out = arguments, arguments.out
        self.began, self.after = time.monotonic(), 0
        self.stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        if arguments.resume:
            self.stamp, after = arguments.resume.rsplit("@", 1)
            self.after = int(after)
        self.run = GpuRun(QUICK if arguments.quick else FULL, "triton", "")
        self.minutes = arguments.minutes or MINUTES
        self.seconds = 60 * self.minutes - TABLE_SECONDS

    def measure(self) -> None:
        """Every step that is asked for, fits the memory and the minutes."""
        steps = self._steps()
        for number, step in enumerate(steps):
            if number < self.after:
                continue
            self._tell(f"[{number + 1}/{len(steps)}] {step.part}: {step.what}")
            if why := self._left_out(step):
                self._keep(step, self._untimed(step, "skipped", why))
                continue
            try:
                self.run.measure_roofs()
                for row in step.measure(self.run):
                    self._keep(step, row)
            except Exception as error:  # the steps after it are worth having
                from openmsa.cli.bench_gpu_plan import reason

                self._keep(step, self._untimed(step, "failed", reason(error)))
                del error
                self._start_afresh(number + 1)

    def finish(self) -> int:
        """The table and the plot of all rows of this run, also those of a process before."""
        from openmsa.accounting import rows
        from openmsa.cli import bench_gpu_pictures

        path = self.out / "gpu.csv"
        found = [row for row in rows.read(path) if row["run"] == self.stamp]
        _print(COLUMNS, [cells(row) for row in found if row["status"] in ("measured", "checked")])
        for status in ("missing", "skipped", "failed"):
            for line in _grouped(row for row in found if row["status"] == status):
                print(f"{status}: {line}")
        try:
            if drawn := bench_gpu_pictures.draw(found, self.out / "gpu_context"):
                say(f"drew {drawn[0]}")
        except ModuleNotFoundError as error:
            say(f"no plot: needs the package {error.name} (pip install 'openmsa[report]')")
        say(f"wrote {path}")
        bad = [row for row in found if row["status"] == "failed" or row["right"] == "no"]
        if bad:
            say(f"{len(bad)} of {len(found)} rows failed or are wrong: {bad[0]['what']} ...")
        return 1 if bad or not found else 0

    def _steps(self) -> list:
        from openmsa.cli import bench_gpu_layers as layers
        from openmsa.cli import bench_gpu_parts as parts
        from openmsa.cli import bench_gpu_sweeps as sweeps

        makers: dict[str, Callable[..., Iterator]] = {
            "check": parts.checks,
            "select": parts.choosing,
            "attend": parts.attending,
            "loss": parts.losses,
            "prefill": sweeps.prefills,
            "decode": sweeps.decodes,
            "layer": layers.layers,
            "workloads": layers.cases,
            "peers": layers.peers,
        }
        wanted = self.arguments.parts or PARTS
        return [step for name in PARTS if name in wanted for step in makers[name](self.run)]

    def _left_out(self, step) -> str:
        """Why a step is not measured; empty if it is."""
        from openmsa.accounting import gpu

        left = self.seconds - (time.monotonic() - self.began)
        if step.seconds > left and not self.arguments.quick:
            told = f"{max(0, left):.0f} s of {self.minutes} min are left (--minutes)"
            return f"takes about {step.seconds:.0f} s, {told}"
        free = gpu.free_bytes()
        if step.bytes > free:
            return f"needs {step.bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return ""

    def _start_afresh(self, number: int) -> None:
        """Replace the process where its GPU is lost; elsewhere do nothing."""
        from openmsa.accounting import gpu

        if not gpu.lost():
            return
        self._tell("the GPU is lost to this process; a new one goes on")
        left = max(1, round((self.seconds - (time.monotonic() - self.began)) / 60))
        command = ["bench", "gpu", "--out", str(self.out), "--minutes", str(left)]
        command += ["--resume", f"{self.stamp}@{number}"]
        command += ["--quick"] if self.arguments.quick else []
        if self.arguments.parts:
            command += ["--parts", ",".join(self.arguments.parts)]
        os.execv(sys.executable, [sys.executable, "-m", "openmsa", *command])

    def _untimed(self, step, status: str, why: str):
        return self.run.untimed(step.what, status, why)

    def _keep(self, step, row) -> None:
        from openmsa.accounting.rows import append
        from openmsa.cli.bench_gpu_rows import GPU_COLUMNS, as_csv

        row = dataclasses.replace(row, part=step.part)
        kept = as_csv(row, self.run, self.stamp)
        append(self.out / "gpu.csv", [kept], GPU_COLUMNS)
        self._tell("  " + "  ".join(filter(None, cells(kept))) + _end(kept))

    def _tell(self, words: str) -> None:
        say(f"{time.monotonic() - self.began:6.0f} s  {words}")


def _end(row: dict) -> str:
    """What stands behind a row on stderr: why it was not measured, or that it is wrong."""
    if row["status"] in ("missing", "skipped", "failed"):
        return f"  {row['status']}: {row['note']}"
    return f"  WRONG: {row['checked']}" if row["right"] == "no" else ""


def _grouped(rows: Iterable[dict[str, str]]) -> list[str]:
    """What was not measured, told once for each reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["note"], []).append(row["what"])
    return [f"{'; '.join(dict.fromkeys(whats))}: {why}" for why, whats in found.items()]


def cells(row: dict[str, str]) -> tuple[str, ...]:
    """A row of the csv as the table shows it."""
    what = row["what"] if row["batch"] in ("", "1", 1) else f"{row['what']}, batch {row['batch']}"
    rival = f"{float(row['rival_p50']):.4g} {row['rival']}" if row["rival"] else ""
    return (
        what,
        row["shape"].rpartition(" ")[2],
        f"{float(row['p50']):.4g} ms" if row["p50"] else "",
        f"{float(row['floor_ms']):.4g}" if row["floor_ms"] else "",
        rival,
        f"{row['ratio']}x" if row["ratio"] else "",
        row["at_least"],
        row["met"],
        row["right"],
        f"{float(row['peak_gb']):.2f} GB" if row["peak_gb"] else "",
    )


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    rows = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
