"""The report opens alone, says what was measured, and escapes what it was given."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from openmsa.evaluation import sentences
from openmsa.evaluation.evidence import Evidence, ModelEvidence, machine_settings, measure
from openmsa.evaluation.plain import from_plain, read_json, to_plain, write_json, write_whole
from openmsa.evaluation.report import draw, render, summary_rows, write_report
from tests.evaluation.made_up import EDGES, answers, evidence, losses, times

VOID = {"meta", "br", "img", "link", "input", "hr"}
SECTIONS = ["criteria", "summary", "perplexity", "retrieval", "recall", "training"]
SECTIONS += ["selection", "decoding", "bearing", "sample", "settings", "reproduce"]


class Page(HTMLParser):
    """Collects ids, links, loads and text; fails on tags that do not close in order."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.ids, self.targets, self.tags, self.open, self.words = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._attributes(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def _attributes(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "poster", "srcset"):
                self.targets.append(value)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html() -> str:
    return render(evidence())


def test_it_parses_and_has_every_section_and_picture(html):
    page = Page(html)
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    assert page.tags.count("svg") == 7 and page.tags.count("section") == len(SECTIONS)
    assert len(page.ids) == len(set(page.ids)), "ids of different pictures must differ"


def test_it_loads_nothing(html):
    page = Page(html)
    assert all(t.startswith(("#", "data:image/png;base64,")) for t in page.targets)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"base64,[^\"']*", "", html))
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_every_reference_inside_a_picture_is_answered(html):
    page = Page(html)
    asked = {t[1:] for t in page.targets if t.startswith("#")} | set(
        re.findall(r"url\(#([^)]*)", html)
    )
    assert asked <= set(page.ids)


def test_it_follows_the_readers_light_and_width(html):
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    body = html[html.index("<body>") :]
    assert "#1f2328" not in body and "var(--ink)" in body, "pictures take the page's colours"
    declared = set(re.findall(r"--(\w+):", html))
    assert set(re.findall(r"var\(--(\w+)\)", html)) <= declared


def test_what_it_was_given_is_escaped(html):
    assert "<conversion>" not in html and "Made-up &lt;conversion&gt; &amp; report" in html
    assert "<b>bold</b>" not in html
    nasty = evidence(sample=replace(evidence().sample, written="</pre><script>alert(1)</script>"))
    page = Page(render(nasty, {}))
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text


def test_the_summary_has_the_numbers():
    rows = {row["measure"]: row for row in summary_rows(evidence())}
    assert rows["perplexity against dense"]["dense"] == "–"
    assert rows["perplexity against dense"]["converted"].startswith("+0.44%")
    assert rows["key value at 1,024 tokens"]["untrained index"] == "12.5% (6/48)"
    assert rows["score recall"] == {
        "measure": "score recall",
        "dense": "–",
        "converted": "0.935",
        "untrained index": "0.485",
    }
    assert rows["ms per token at 64K tokens"]["converted"] == "4.20"


def test_sentences_follow_the_numbers():
    good = evidence()
    assert "converted is the faster one from 1K tokens on" in sentences.decoding(good)
    slow = evidence(converted=replace(good.converted, decode=times(1.0)))
    assert "not faster at that length" in sentences.decoding(slow)
    assert "converted 96 of 96" in sentences.retrieval(good)
    assert "8 times the 128 tokens" in sentences.retrieval(good)
    assert "+0.44%" in sentences.perplexity(good)
    assert "first block is selected by 70%" in sentences.selection(good.selection)
    assert "To keep dense: 2." in sentences.bearing(good.bearing)
    assert "from 0.900 to 0.828" in sentences.training(good)


def test_a_wrong_sample_is_called_wrong():
    wrong = evidence(sample=replace(evidence().sample, written="1111"))
    assert "wrong; the right answer was '4821'" in Page(render(wrong, {})).text
    assert "That is the right answer" in Page(render(evidence(), {})).text


def test_what_is_missing_is_said_to_be_missing():
    bare = Evidence("bare", 16, 8, ModelEvidence(), ModelEvidence(), ModelEvidence())
    assert draw(bare) == {}
    page = Page(render(bare))
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS and "svg" not in page.tags
    assert page.text.count("Not measured in this run.") == 8
    assert "0 of 5 criteria hold" in page.text


def test_files_are_written_whole_and_the_json_reads_back(tmp_path):
    path = write_report(evidence(), tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    Page(path.read_text(encoding="utf-8"))
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["verdict"] == "All 5 criteria hold." and len(told["criteria"]) == 5
    assert from_plain(Evidence, told["evidence"]) == evidence()
    names = {p.name for p in (tmp_path / "out" / "figures").iterdir()}
    assert {"retrieval.svg", "retrieval.png", "bearing.svg"} <= names and len(names) == 14
    assert not list((tmp_path / "out").rglob("*unfinished*"))


def test_the_same_evidence_gives_the_same_bytes(html):
    assert render(evidence()) == html


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "page.html", "old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_plain_data_is_strict(tmp_path):
    one = losses(0.1)
    assert read_json(type(one), write_json(tmp_path / "a.json", one)) == one
    plain = to_plain(answers(1.0))
    with pytest.raises(ValueError, match="no field 'total_count'"):
        from_plain(type(answers(1.0)), {**plain, "total_count": 3})
    del plain["total"]
    with pytest.raises(ValueError, match="lacks the field 'total'"):
        from_plain(type(answers(1.0)), plain)
    assert to_plain({"x": float("nan"), "y": (1, 2)}) == {"x": None, "y": [1, 2]}


def test_models_measured_on_different_texts_are_not_compared():
    other = replace(losses(0.0), fingerprint="other")
    with pytest.raises(ValueError, match="same tokens"):
        render(evidence(converted=ModelEvidence(perplexity=other)))


def test_measuring_a_real_model_fills_every_part():
    import openmsa
    from openmsa import hf
    from openmsa.evaluation.retrieval import RetrievalPlan
    from openmsa.training.byte_tokenizer import byte_tokenizer
    from tests.hf.tiny import tiny_model, tiny_tokens

    plan = RetrievalPlan("a line\n" * 40, ("passkey",), (120,), (0.0,), 2)
    model = tiny_model("qwen3", vocab_size=258)
    seen = set()
    arguments = {
        "plan": plan,
        "decode_contexts": (32,),
        "progress": lambda what, done, total: seen.add((what, done == total)),
    }
    dense = measure(model, byte_tokenizer(), tiny_tokens(2, 60), **arguments)
    hf.convert(model, openmsa.MSAConfig(block_size=4, top_k=3))
    sparse = measure(model, byte_tokenizer(), tiny_tokens(2, 60), **arguments)
    assert dense.recall is None and len(sparse.recall.layers) == 3
    assert dense.perplexity.fingerprint == sparse.perplexity.fingerprint
    assert dense.perplexity.edges != EDGES and sparse.decode[0].context_tokens == 32
    for what in ("perplexity", "retrieval", "recall", "decoding time"):
        assert (what, True) in seen


def test_the_machine_is_described_in_words():
    told = machine_settings()
    assert told["torch"].startswith("2.") and told["commit"]
    assert all(isinstance(value, str) and value for value in told.values())
