"""Pages that scripts write say what their sources say now."""

from __future__ import annotations

import csv
import re

import pytest

from openmsa.evaluation.comparison import Comparison
from openmsa.evaluation.comparison_page import as_csv
from openmsa.evaluation.headers import FACTS, MECHANISMS
from plots import compare, mechanisms
from tests.evaluation import made_up

STAMP = {"start": "dense", "device": "here", "commit": "abc", "date": "today", "command": "it"}
PAGES = mechanisms.pages()


@pytest.mark.parametrize("name", PAGES)
def test_the_page_of_a_mechanism_is_in_step_with_its_header(name):
    told = "say it in openmsa/mechanisms, then run: python plots/mechanisms.py"
    assert (mechanisms.FOLDER / name).read_text(encoding="utf-8") == PAGES[name], told


def test_there_is_a_page_for_each_and_no_other():
    assert {path.name for path in mechanisms.FOLDER.iterdir()} == set(PAGES)
    assert set(PAGES) == {"README.md"} | {f"{name}.md" for name in MECHANISMS}


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_page_has_equations_facts_numbers_and_a_truth(name):
    page = PAGES[f"{name}.md"]
    assert "```text\n" in page and page.count("```") % 2 == 0
    for fact in FACTS:
        assert page.count(f"- **{fact}:** ") == 1
    held = page.partition("## Checked against")[2].partition("## Use")[0]
    assert len(re.findall(r"\| \d\.\de[-+]\d\d \|", held)) >= 1


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            assert (mechanisms.FOLDER / target).exists(), (name, target)
    for target in re.findall(r"\]\(([^)#]+)\)", compare.PAGE.read_text(encoding="utf-8")):
        assert (compare.PAGE.parent / target).exists(), target


@pytest.fixture(scope="module")
def rows():
    found = tuple(made_up.contender(name, n) for n, name in enumerate(("dense", "window", "msa")))
    text = as_csv(Comparison("made up", "", found), STAMP)
    return list(csv.DictReader(text.splitlines()))


def test_tables_of_a_comparison_hold_its_numbers(rows):
    told = compare.tables(rows)
    assert "### Converted from the dense model" in told and "random weights" not in told
    assert "commit `abc`, here." in told and "trained on: 640." in told
    change = compare.value(rows, "msa", "perplexity change")
    assert f"best first: window {compare.value(rows, 'window', 'perplexity change'):+.2f} %" in told
    (line,) = [line for line in told.splitlines() if line.startswith(f"| msa | {perplexity(rows)}")]
    assert f" {change:+.2f} ± " in line
    assert "| passkey at 256 | passkey at 1,024 | key value at 256 | key value at 1,024 |" in told
    assert "| msa | 88 % | 88 % | 88 % | 88 % |" in told
    assert "prefill MB at 2,048" in told and "| window | 47 | 186 | – | – |" in told
    for table in re.findall(r"(?:^\|.*\n?)+", told, flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def perplexity(rows) -> str:
    return f"{compare.value(rows, 'msa', 'perplexity'):.3f}"


def test_tables_take_the_place_of_what_was_there(rows):
    page = f"# A\n\n{compare.BEGIN}\n\nold\n\n{compare.END}\n\nlast\n"
    once = compare.filled(page, rows)
    assert "old" not in once and once.startswith("# A\n") and once.endswith("\nlast\n")
    assert compare.filled(once, rows) == once


def test_the_page_of_the_comparison_shows_the_rows_that_are_here():
    page = compare.PAGE.read_text(encoding="utf-8")
    assert page.count(compare.BEGIN) == page.count(compare.END) == 1
    if compare.CSV.exists():
        assert compare.filled(page, compare.read(compare.CSV)) == page, "run: plots/compare.py"
