"""openmsa bench gpu: rehearsed in Triton's interpreter, and what it does when something fails."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openmsa.cli import bench_gpu, bench_gpu_plan, main
from openmsa.cli.bench_gpu_plan import FULL, QUICK, GpuRun, Step
from openmsa.cli.bench_gpu_rows import GPU_COLUMNS
from openmsa.ops import gpu

ROOT = Path(__file__).parents[2]


def rehearse(out: Path, *flags: str) -> tuple[subprocess.CompletedProcess, list[dict[str, str]]]:
    """The command in a process of its own: Triton must be told to interpret before it loads."""
    command = [sys.executable, "-m", "openmsa", "bench", "gpu", "--quick", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    with (out / "gpu.csv").open(newline="", encoding="utf-8") as file:
        return done, list(csv.DictReader(file))


def test_a_rehearsal_keeps_rows_and_draws(tmp_path):
    pytest.importorskip("triton")
    done, rows = rehearse(tmp_path, "--parts", "select,decode")
    assert done.returncode == 0, done.stderr[-3000:]
    assert tuple(rows[0]) == GPU_COLUMNS
    assert {row["status"] for row in rows} <= {"measured", "missing"}
    ours = [row for row in rows if row["what"].startswith("one decode step, MSA")]
    assert {(row["context"], row["batch"]) for row in ours} == {
        (str(s), str(batch)) for s in QUICK.decode for batch in QUICK.batches
    }
    for row in ours:
        assert float(row["p50"]) > 0 and row["device"] and row["commit"]
        assert float(row["floor_ms"] or 1) > 0
        assert float(row["matmul_tflops"]) > 0 and float(row["copy_gb_s"]) > 0
    assert {row["right"] for row in rows if row["what"].startswith("select_blocks, ")} == {"yes"}
    assert (tmp_path / "gpu_context.svg").exists()


@pytest.mark.slow
def test_everything_is_rehearsed(tmp_path):
    pytest.importorskip("triton")
    done, rows = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {row["part"] for row in rows} == set(bench_gpu.PARTS)
    assert not [row for row in rows if row["right"] == "no" or row["status"] == "failed"]


def arguments(tmp_path, **more):
    given = {"quick": True, "out": tmp_path, "minutes": None, "parts": None, "resume": None}
    return argparse.Namespace(**{**given, **more})


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A run without kernels: its steps are those that a test puts there."""
    monkeypatch.setattr(GpuRun, "measure_roofs", lambda run: None)
    monkeypatch.setattr("openmsa.accounting.gpu.free_bytes", lambda: 10**9)
    monkeypatch.setattr("openmsa.accounting.gpu.lost", lambda: False)

    def make(*steps: Step, **more):
        made = bench_gpu._Bench(arguments(tmp_path, **more))
        monkeypatch.setattr(made, "_steps", lambda: list(steps))
        return made

    return make


def step(what: str, measure, seconds: float = 1, num_bytes: int = 0) -> Step:
    return Step("check", what, seconds, num_bytes, measure)


def fine(run: GpuRun):
    yield run.untimed("fine", "checked")


def test_a_failure_is_a_row_and_the_run_goes_on(bench, tmp_path, capsys):
    def fail(run):
        yield run.untimed("before", "checked")
        raise RuntimeError("\nout of shared memory\nby far")

    made = bench(step("bad", fail), step("good", fine))
    made.measure()
    assert made.finish() == 1
    assert "failed: bad: RuntimeError: out of shared memory" in capsys.readouterr().out
    with (tmp_path / "gpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["status"]) for row in rows] == [
        ("before", "checked"),
        ("bad", "failed"),
        ("fine", "checked"),
    ]


def test_what_does_not_fit_is_left_out_and_told(bench, capsys):
    never = pytest.fail
    large, long = step("large", never, num_bytes=10**12), step("long", never, seconds=10**6)
    made = bench(large, long, step("good", fine), quick=False, minutes=1)
    made.measure()
    assert made.finish() == 0
    told = capsys.readouterr().out
    assert "skipped: large: needs 1000.0 GB, 1.0 GB are free" in told
    assert "skipped: long: takes about 1000000 s" in told and "of 1 min are left" in told


def test_a_lost_gpu_costs_its_step_only(bench, tmp_path, monkeypatch):
    """The process is replaced by one that goes on with the next step, under the same stamp."""
    calls = []
    monkeypatch.setattr("openmsa.accounting.gpu.lost", lambda: True)
    monkeypatch.setattr(bench_gpu.os, "execv", lambda program, command: calls.append(command))

    def fail(run):
        raise RuntimeError("an illegal memory access was encountered")

    made = bench(step("one", fine), step("bad", fail), parts=("check",), minutes=7, quick=False)
    made.measure()
    (command,) = calls
    assert command[command.index("--resume") + 1] == f"{made.stamp}@2"
    assert command[command.index("--parts") + 1] == "check"
    again = bench_gpu._Bench(arguments(tmp_path, resume=f"{made.stamp}@2"))
    assert (again.stamp, again.after) == (made.stamp, 2)
    assert again.finish() == 1  # what failed before it still counts


def test_the_plan_fits_ten_minutes_and_covers_what_was_promised():
    pytest.importorskip("triton")
    assert FULL.prefill == tuple(1 << n for n in range(15, 21))
    assert FULL.decode[0] == 1 << 16 and FULL.decode[-1] == 1 << 20
    assert FULL.batches == (1, 8, 64)
    made = bench_gpu._Bench(arguments(Path(), quick=False))
    steps = made._steps()
    assert sum(step.seconds for step in steps) <= 60 * bench_gpu.MINUTES
    assert {step.part for step in steps} == set(bench_gpu.PARTS)
    assert steps[0].part == "check" and steps[-1].part == "peers"


def test_without_a_gpu_the_way_out_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "unavailable", lambda: "there is no CUDA or ROCm device here")
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "no CUDA or ROCm device" in told and "TRITON_INTERPRET=1" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gpu", "--suite", "table"], "--suite belongs to bench cpu"),
        (["gpu", "--threads", "2"], "--threads belongs to bench cpu"),
        (["gpu", "--minutes", "0"], "--minutes"),
        (["gpu", "--parts", "chess"], "unknown: chess"),
        (["cpu", "--parts", "select"], "--parts belongs to bench gpu"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_refused(flags, message, tmp_path, capsys):
    assert main(["bench", *flags, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_counted_pairs_are_those_of_a_selection():
    from openmsa import select_blocks
    from openmsa.accounting import work
    from tests.support import index_qk

    shape = QUICK.shape
    for t, s in ((37, 37), (1, 50), (20, 45)):
        made = index_qk(1, t, s, shape.g, shape.d_index)
        selection = select_blocks(*made, block_size=shape.block_size, top_k=shape.top_k)
        counted = bench_gpu_plan.chosen_pairs(shape, t, s)
        assert counted == work.selected_pairs(selection, s)
