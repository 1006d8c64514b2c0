"""The README keeps its promises: its example runs, its links lead somewhere, it stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from openmsa.cli import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
    return [text for named, text in fenced if named == language]


def test_the_example_runs_and_has_twelve_lines(capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([1, 512, 8, 32])" in capsys.readouterr().out
    assert len([line for line in code.splitlines() if line.strip()]) <= 12


def test_it_is_at_most_150_lines():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_named(verb):
    assert f"openmsa {verb}" in README


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert f"\n{target}:" in makefile, target


def test_links_within_the_repository_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_the_tree_names_every_room():
    rooms = {path.name for path in (ROOT / "openmsa").iterdir() if path.is_dir()} - {"__pycache__"}
    (tree,) = [block for block in blocks("") if block.startswith("openmsa/")]
    for room in rooms:
        assert f"\n  {room}/" in tree, room
