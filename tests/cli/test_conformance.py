"""The verb `conformance`: what it prints, what it writes, and its exit code."""

from __future__ import annotations

import json

import pytest

from openmsa.cli import main
from openmsa.conformance.recipes import NAMES

WRONG = "tests.conformance.wrong:PoolsByMean"


def test_a_right_engine_exits_with_0(capsys):
    assert main(["conformance", "--adapter", "reference", "--case", "plain"]) == 0
    shown = capsys.readouterr().out
    assert "plain" in shown and "FAIL" not in shown and "groups" not in shown


def test_a_wrong_engine_exits_with_1_and_says_why(tmp_path, capsys):
    file = tmp_path / "found.json"
    cases = ["--case", "plain", "--case", "no_selection"]
    command = ["conformance", "--adapter", WRONG, "--adapter", "portable", *cases]
    assert main([*command, "--json", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "FAIL plain, blocks" in shown and "All engines" in shown
    engines = json.loads(file.read_text())["engines"]
    assert [engine["name"] for engine in engines] == ["tiny", "portable"]
    assert {v["case"] for v in engines[0]["verdicts"]} == {"plain", "no_selection"}


def test_what_is_not_offered_is_said(capsys):
    asked = ["--adapter", "tests.conformance.tiny:OnlyAttends", "--case", "packing"]
    assert main(["conformance", *asked]) == 0
    assert "not offered by only attends" in capsys.readouterr().out


def test_the_list_names_every_case_and_engine(capsys):
    assert main(["conformance", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "mlx-lm" in shown and all(name[:8] in shown for name in NAMES)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--case", "nonsense"], 2, "there is no case 'nonsense'"),
        (["--adapter", "vllm"], 2, "there is no adapter 'vllm'"),
        (["--adapter", "nowhere:Engine"], 1, "cannot be loaded"),
        (["--dtype", "int8"], 2, "--dtype"),
    ],
)
def test_refusals(flags, code, message, capsys):
    assert main(["conformance", *flags]) == code
    assert message in capsys.readouterr().err
