"""openmsa cost, from the command to its tables, csv, json and plot; and what it refuses."""

from __future__ import annotations

import csv
import json

import pytest

from openmsa.accounting.designs import DESIGNS
from openmsa.cli import main
from openmsa.cli.cost import contexts
from openmsa.cli.cost_table import duration, si

BRIEFLY = ("cost", "--context", "2K,8K")


@pytest.fixture
def asked(capsys):
    """Run the verb with these flags; return (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


def test_the_papers_numbers_are_told(asked):
    code, out, _ = asked("cost", "--mechanism", "dense,msa", "--context", "128K,1M")
    told = " ".join(out.split())
    assert code == 0
    assert "16.0x at 128K, 28.4x at 1M; break-even at 4,228 tokens" in told
    assert "Estimated, not measured" in told and "63% of the chip's matrix rate" in told
    assert "7.88x" in told and "17.2 G" in told and "NVIDIA H100" in told


def test_everything_is_written(asked, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["openmsa", *BRIEFLY])
    out = tmp_path / "out"
    code, shown, told = asked(*BRIEFLY, "--out", out)
    assert code == 0 and all(name in shown for name in DESIGNS)
    names = {"cost.csv", "cost.json", "cost.svg", "cost.png"}
    assert {path.name for path in out.iterdir()} == names
    assert all(name in told for name in names)
    with (out / "cost.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["context"], row["mechanism"]) for row in rows] == [
        (str(s), name) for s in (2048, 8192) for name in DESIGNS
    ]
    for row in rows:
        assert (
            row["model"] == "msa-109b" and row["chip"] == "h100" and float(row["cache_bytes"]) > 0
        )
        assert row["assumed_matrix_efficiency"] == "0.63" and "not measurements" in row["nature"]
        assert row["command"] == "openmsa cost --context 2K,8K"
    plain = json.loads((out / "cost.json").read_text(encoding="utf-8"))
    assert plain["designs"]["msa"]["top_k"] == 16 and plain["designs"]["nsa"]["source"]
    assert plain["chip"]["memory_rate"] == 3.35e12 and plain["shape"]["h"] == 64
    assert plain["equation_12"]["break_even_tokens"] == pytest.approx(4228.13, abs=0.01)
    assert len(plain["estimates"]) == 14 and "not measurements" in plain["nature"]
    svg = (out / "cost.svg").read_text(encoding="utf-8")
    assert "$ per M prompt tokens" in svg and "infllm2" in svg


def test_what_out_holds_is_kept(asked, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    code, _, told = asked(*BRIEFLY, "--out", tmp_path)
    assert code == 2 and "--overwrite" in told and kept.read_text() == "kept"


def test_a_chip_without_a_price_is_drawn_in_seconds(asked, tmp_path):
    flags = ("--chip", "h800", "--mechanism", "dense,window", "--out", tmp_path / "out")
    code, out, _ = asked(*BRIEFLY, *flags)
    assert code == 0 and "No price is known for h800" in out
    svg = (tmp_path / "out" / "cost.svg").read_text(encoding="utf-8")
    assert "ms a token" in svg and "$ per M" not in svg


def test_numbers_chips_and_models_of_ones_own(asked, tmp_path):
    chip = {"bf16_flops": 1e14, "memory_rate": 1e12, "memory_bytes": 6e10, "title": "My chip"}
    file = tmp_path / "chips.json"
    file.write_text(json.dumps({"chips": {"mine": chip}}))
    model = tmp_path / "config.json"
    model.write_text(
        json.dumps(
            {
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "vocab_size": 99,
                "intermediate_size": 128,
            }
        )
    )
    flags = ("--model", model, "--chip", "mine", "--chip-file", file, "--mechanism", "dense,msa")
    settings = ("--set", "msa.block_size=16", "--set", "msa.top_k=3", "--dense-layers", "1")
    code, out, _ = asked("cost", "--context", "1000", *flags, *settings)
    told = " ".join(out.split())
    assert code == 0 and "1,000 tokens" in told and "1 x My chip" in told
    assert "│ msa │ 48 │" in told and "1 of 4 layers stay dense" in told


def test_what_does_not_fit_is_marked(asked):
    code, out, _ = asked(*BRIEFLY, "--mechanism", "dense,msa", "--chips", "1")
    assert code == 0 and "dense !" in out and "does not fit" in out


def test_the_list_names_sources(asked):
    code, out, _ = asked("cost", "--list")
    assert code == 0
    for word in (
        "h200",
        "minimax-m3",
        "qwen3-32b",
        "top_k=16",
        "arXiv 2606.13392",
        "data sheet",
        "chips.json",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "llama-8b"), "did you mean llama3-8b?"),
        (("--model", "./nowhere"), "no shape and no config.json './nowhere'"),
        (("--chip", "h10"), "there is no chip 'h10'; did you mean h100?"),
        (("--chip-file", "nowhere.json"), "--chip-file nowhere.json is no file"),
        (("--context", "8Q"), "'8Q' is no number of tokens"),
        (("--context", "0"), "from 1 to 16M"),
        (("--context", "17M"), "from 1 to 16M"),
        (("--mechanism", "msa,mamba"), "unknown: mamba"),
        (("--set", "msa.top_k"), "MECHANISM.NUMBER=VALUE"),
        (("--set", "mamba.top_k=3"), "there is no mechanism 'mamba'"),
        (("--set", "msa.topk=3"), "msa has no number 'topk'"),
        (("--set", "msa.top_k=0"), "msa.top_k must be at least 1"),
        (("--mechanism", "dense", "--set", "msa.top_k=3"), "not among --mechanism"),
        (("--dense-layers", "99"), "99 dense attention layers of 41"),
        (("--batch", "0"), "--batch"),
        (("--matrix-efficiency", "1.5"), "--matrix-efficiency"),
        (("--cache-bytes", "3"), "--cache-bytes"),
        (("--hardware", "h100"), "--hardware"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_it_refuses(asked, flags, message):
    code, out, told = asked("cost", *flags)
    assert code == 2 and message in told and not out


def test_numbers_are_read_and_written_as_people_do():
    assert contexts("1m, 8K,512,8192") == (512, 8192, 1 << 20)
    assert [si(x) for x in (17.18e9, 1, 0.5, 999.9e12)] == ["17.2 G", "1 ", "0.5 ", "1 P"]
    assert [duration(x) for x in (80.5, 0.9999, 4.84, 0.0037, 2e-6)] == [
        "1.34 min",
        "1 s",
        "4.84 s",
        "3.7 ms",
        "2 µs",
    ]
