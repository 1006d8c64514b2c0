"""openmsa bench cpu, from the command to its csv and its plot, on tiny shapes."""

from __future__ import annotations

import csv

import pytest
import torch

from openmsa.accounting import m3
from openmsa.cli import bench_sweep, main
from openmsa.cli.bench_plan import QUICK, Run
from openmsa.cli.bench_rows import BENCH_COLUMNS
from openmsa.cli.bench_sweep import DECODE, DENSE, MSA, PREFILL, SDPA, WHOLE, Point

QUICKLY = ("bench", "cpu", "--quick", "--backend", "portable")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """transformers' side needs two more processes; tests/accounting/test_m3.py is about it."""
    monkeypatch.setattr(m3, "missing", lambda: "another test's business")


def read(path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_is_measured_checked_printed_and_kept(tmp_path, capsys):
    assert main([*QUICKLY, "--suite", "table", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "another test's business" in shown.err
    rows = read(tmp_path / "cpu_table.csv")
    assert tuple(rows[0]) == BENCH_COLUMNS
    operations = {row["what"].partition(",")[0] for row in rows}
    assert operations == {
        "select_blocks",
        "select + attend",
        "sparse_attention forward",
        "sparse_attention backward",
        "dense_attention forward",
        "dense_attention backward",
        "one decode step",
        "MSA layer as fast as SDPA from",
    }
    for row in rows:
        assert row["what"] in shown.out
        if row["metric"] == "context":
            continue
        assert row["right"] == "yes" and float(row["p20"]) <= float(row["p50"]) and row["checked"]
        assert float(row["ratio"]) > 0 and float(row["rival_p50"]) > 0 and row["rival"]
        # Targets belong to the full shapes.
        assert row["met"] == row["at_least"] == ""
    assert {row["data"] for row in rows} == {"random", "agreeing"}
    assert {"bf16", "fp32"} == {row["shape"].rpartition(" ")[2] for row in rows}
    told = rows[0]
    assert told["backend"] == "portable" and told["torch"] == torch.__version__
    assert int(told["threads"]) == torch.get_num_threads() and int(told["cores"]) >= 1
    assert told["command"] and told["commit"] and told["device"]


def test_the_sweep_has_every_line_and_a_plot_and_names_the_crossover(tmp_path, capsys):
    command = [*QUICKLY, "--suite", "sweep", "--context", "64,256", "--out", str(tmp_path)]
    assert main(command) == 0
    rows = read(tmp_path / "cpu_sweep.csv")
    assert {row["context"] for row in rows} == {"64", "128", "256"}
    assert {row["what"] for row in rows} == {MSA, DENSE, SDPA}
    assert {row["metric"] for row in rows} == {PREFILL, WHOLE, DECODE}
    assert len(rows) == 27
    assert {path.name for path in tmp_path.iterdir()} == {
        "cpu_sweep.csv",
        "cpu_sweep.png",
        "cpu_sweep.svg",
    }
    assert "MSA is" in capsys.readouterr().out
    assert main(command) == 0
    assert len(read(tmp_path / "cpu_sweep.csv")) == 54


def test_workloads_are_cut_to_size_and_weighed(tmp_path):
    assert main([*QUICKLY, "--suite", "workloads", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "cpu_workloads.csv")
    assert len(rows) == 9 and sum("weighted mean" in row["what"] for row in rows) == 3
    for row in rows:
        assert row["note"] if "mean" in row["what"] else row["right"] == "yes"


def test_a_wrong_result_is_no_success(tmp_path, capsys, monkeypatch):
    right = Run.attend
    monkeypatch.setattr(Run, "attend", lambda *a, **how: 1.5 * right(*a, **how))
    assert main([*QUICKLY, "--suite", "table", "--out", str(tmp_path)]) == 1
    assert "WRONG: out error" in capsys.readouterr().err
    assert "no" in {row["right"] for row in read(tmp_path / "cpu_table.csv")}


def test_a_part_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("openmsa.accounting.rivals.backward", fail)
    assert main([*QUICKLY, "--suite", "table", "--out", str(tmp_path)]) == 1
    assert "failed: out of luck" in capsys.readouterr().err
    assert any("decode" in row["what"] for row in read(tmp_path / "cpu_table.csv"))


def test_parts_beyond_the_context_are_left_out(tmp_path, capsys):
    command = [*QUICKLY, "--suite", "table", "--context", "64,128", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "left out, --context ends at 128" in capsys.readouterr().err
    assert not any("decode" in row["what"] for row in read(tmp_path / "cpu_table.csv"))


def test_threads_are_those_asked_for_and_return(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        bench_sweep, "sweep", lambda run: seen.append(torch.get_num_threads()) or []
    )
    before = torch.get_num_threads()
    assert main([*QUICKLY, "--suite", "sweep", "--threads", "3", "--out", str(tmp_path)]) != 0
    assert seen == [3] and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["tpu"], "invalid choice"),
        (["cpu", "--suite", "chess"], "--suite"),
        (["cpu", "--context", "2048"], "two different lengths"),
        (["cpu", "--context", "8,16,32"], "two different lengths"),
        (["cpu", "--context", "few"], "--context"),
        (["cpu", "--threads", "0"], "--threads"),
        (["cpu", "--backend", "abacus"], "--backend"),
        (["cpu", "--backend", "portable", "--instruction-set", "avx2"], "belongs to --backend cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(flags, message, tmp_path, capsys):
    assert main(["bench", *flags, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_a_backend_that_is_not_usable_says_why(tmp_path, capsys, monkeypatch):
    usable = {"portable": None, "cpu": "no compiler was found"}
    monkeypatch.setattr("openmsa.ops.backend.availability", lambda: usable)
    assert main(["bench", "cpu", "--backend", "cpu", "--out", str(tmp_path)]) == 2
    assert "no compiler was found" in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert main(["bench", "cpu", "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def line(name: str, metric: str, values: dict[int, float]) -> list[Point]:
    from openmsa.accounting.timing import Times

    return [Point(name, metric, s, Times((seconds,))) for s, seconds in values.items()]


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ({1024: 1, 4096: 1}, "from 1K (the shortest)"),
        ({1024: 4, 4096: 1}, "from about 2,048 tokens, 2 times as fast at 4K"),
        ({1024: 4, 4096: 4}, "not faster than dense (torch SDPA) up to 4K, 0.5 times"),
    ],
)
def test_crossovers_are_named_in_words(ours, words):
    points = line(MSA, PREFILL, ours) + line(SDPA, PREFILL, {1024: 2, 4096: 2})
    told = bench_sweep.crossovers(points + line(DENSE, PREFILL, {1024: 2, 4096: 2}))
    assert words in told[0]
    assert "not measured" in told[-1]


def test_dense_attention_is_cut_by_groups_and_tokens_where_it_would_take_minutes():
    run = Run(QUICK, "portable", "")
    x = run.inputs(128, 1024, torch.bfloat16)
    part, factor, note = bench_sweep._part(run, x)
    assert part is x and factor == 1 and not note
    small = Run(type(QUICK)(**{**vars(QUICK), "slice_flops": 1e6}), "portable", "")
    part, factor, note = bench_sweep._part(small, x)
    assert part.q.shape == (1, 64, 4, 16) and part.k.shape[2] == 1 and factor == 2
    assert "64 query tokens, 1 of 2 groups, scaled" in note


def test_a_sweep_that_starts_beyond_a_chunk_names_no_whole_prefill(tmp_path):
    command = [*QUICKLY, "--suite", "sweep", "--context", "128,256", "--out", str(tmp_path)]
    assert main(command) == 0
    rows = read(tmp_path / "cpu_sweep.csv")
    assert {row["metric"] for row in rows} == {PREFILL, DECODE}


def test_a_whole_prefill_is_added_up_where_it_takes_too_long():
    run = Run(QUICK, "portable", "")
    # A query token costs 1 ms at 64 and 3 ms at 128: half the context and 64 tokens of 2 ms.
    before, after = line(DENSE, PREFILL, {64: 0.001, 128: 0.003})
    shorter = bench_sweep._whole(run, before, None, None)
    assert shorter.times.median == pytest.approx(0.064) and not shorter.note
    longer = bench_sweep._whole(run, after, before, shorter)
    assert longer.times.median == pytest.approx(0.064 + 0.128)
    assert longer.note == bench_sweep.EXTRAPOLATED
