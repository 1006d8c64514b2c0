"""Every mechanism's header says what is scored, shared, trained by and remembered."""

from __future__ import annotations

import pkgutil
from types import SimpleNamespace

import pytest

from openmsa import mechanisms
from openmsa.evaluation import headers
from openmsa.evaluation.headers import FACTS, MECHANISMS, facts_of, header_of, title_of


def test_every_mechanism_has_its_place():
    assert sorted(MECHANISMS) == sorted(m.name for m in pkgutil.iter_modules(mechanisms.__path__))


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_header_is_complete(name):
    facts = facts_of(name)
    assert tuple(facts) == FACTS
    whole = " ".join(header_of(name).split())
    for fact, told in facts.items():
        assert told and f"{fact}: {told}" in whole
        assert not any(f"{other}:" in told for other in FACTS)


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_title_names_the_paper_and_no_letters(name):
    title = title_of(name)
    assert "arXiv" in title and not title.endswith((".", ","))
    assert "our letters" not in title and "equations" not in title and "\n" not in title


def test_a_header_that_lacks_a_fact_is_named(monkeypatch):
    def told(text):
        module = SimpleNamespace(__doc__=text)
        monkeypatch.setattr(headers.importlib, "import_module", lambda name: module)

    told("A title.\n\nScored: all. Shared: none; Trained by: it. Remembered: k;\nand v.")
    assert facts_of("any") == {
        "Scored": "all.",
        "Shared": "none;",
        "Trained by": "it.",
        "Remembered": "k; and v.",
    }
    told("A title.\n\nScored: all. Trained by: it. Remembered: k.")
    with pytest.raises(ValueError, match="any does not say 'Shared'"):
        facts_of("any")
    told("A title.")
    with pytest.raises(ValueError, match="no paragraph that begins with 'Scored:'"):
        facts_of("any")
