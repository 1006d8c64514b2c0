"""Every block of docs/tutorial.md runs, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
TEXT = TUTORIAL.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.M | re.S)


def run_bash(code: str, folder: Path) -> None:
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env={**os.environ, "PATH": beside, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"{code}\n{ran.stderr[-3000:]}"


def test_every_block_is_run():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    for verb in ("inspect", "convert", "train", "evaluate", "generate"):
        assert any(f"openmsa {verb} " in code for kind, code in BLOCKS if kind == "bash"), verb


def test_the_tutorial_runs_from_the_first_block_to_the_last(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, (language, code) in enumerate(BLOCKS):
        if language == "bash":
            run_bash(code, tmp_path)
        else:
            exec(compile(code, f"tutorial.md, block {number}", "exec"), names)
    assert (tmp_path / "judged" / "evaluation.json").is_file()
    assert (tmp_path / "my_msa" / "config.json").is_file()
    assert "msa MSAConfig(block_size=16, top_k=8" in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (TUTORIAL.parent / target).exists(), target
