"""Comparisons as data, rows, figures and a page: made up, and measured on tiny models."""

from __future__ import annotations

import csv
import re
from dataclasses import replace

import pytest
import torch

from openmsa import hf
from openmsa.evaluation import comparison as comparison_module
from openmsa.evaluation import comparison_figures
from openmsa.evaluation.comparison import Comparison, Contender, Lengths, contend, rows
from openmsa.evaluation.comparison_page import as_csv, render, verdict, write_comparison
from openmsa.evaluation.evidence import ModelEvidence
from openmsa.evaluation.headers import FACTS, MECHANISMS, facts_of, title_of
from openmsa.evaluation.plain import read_json, write_json
from openmsa.evaluation.retrieval import RetrievalPlan
from openmsa.inference.timing import DecodeTime
from openmsa.training.byte_tokenizer import byte_tokenizer
from tests.evaluation import made_up
from tests.hf.mechanisms import SMALL
from tests.hf.tiny import tiny_model, tiny_tokens

STAMP = {"command": "openmsa compare", "commit": "abc", "device": "here", "date": "2026-11-25"}


@pytest.fixture(scope="module")
def comparison():
    found = tuple(made_up.contender(name, number) for number, name in enumerate(MECHANISMS))
    return Comparison("A & B", "made up", found, {"texts": "6"}, ("openmsa compare --quick",))


def value_of(comparison, mechanism, metric, context=""):
    wanted = (mechanism, metric, context)
    (row,) = [r for r in rows(comparison) if (r["mechanism"], r["metric"], r["context"]) == wanted]
    return row


def test_rows_hold_every_number_once(comparison):
    found = rows(comparison)
    keys = [(row["mechanism"], row["metric"], row["context"]) for row in found]
    assert len(set(keys)) == len(keys)
    assert {row["mechanism"] for row in found} == set(MECHANISMS)
    change = value_of(comparison, "nsa", "perplexity change")
    assert change["unit"] == "%" and change["low"] < change["value"] < change["high"]
    assert change["value"] == pytest.approx(100 * comparison.changes()["nsa"].perplexity_change)
    assert not [k for k in keys if k[:2] == ("dense", "perplexity change")]
    asked = value_of(comparison, "moba", "key_value", 1024)
    assert asked["value"] == 14 / 16 and asked["low"] < asked["value"] < asked["high"]
    assert value_of(comparison, "dense", "prefill", 2048)["value"] == 204.8
    assert value_of(comparison, "dense", "prefill memory", 2048)["value"] == 2_048_000
    assert not [k for k in keys if k[:2] == ("window", "prefill memory")]
    assert {k[0] for k in keys if k[1] == "score recall"} == {"dsa", "msa"}
    assert value_of(comparison, "msa", "loss", 1024)["unit"] == "nats"


def test_a_cache_is_counted_with_what_is_pooled_of_windows():
    keys = 3 * 2 * 16 * 4  # of one token: layers, KV heads, channels, bytes
    for name, pooled in (("moba", keys), ("infllm2", keys), ("nsa", 2 * keys), ("window", 0)):
        model = hf.convert(tiny_model(num_hidden_layers=3), SMALL[name])
        _, stride = hf.room_of(model).windows or (0, 1)
        assert comparison_module._cache_bytes(model) == round(2 * keys + pooled / stride)


def test_csv_has_the_rows_and_how_they_came_to_be(comparison):
    read = list(csv.DictReader(as_csv(comparison, STAMP).splitlines()))
    assert len(read) == len(rows(comparison))
    columns = ["mechanism", "metric", "context", "value", "unit", "low", "high", *STAMP]
    assert list(read[0]) == columns
    for text, row in zip(read, rows(comparison), strict=True):
        assert float(text["value"]) == pytest.approx(row["value"], rel=1e-5)
        assert {name: text[name] for name in STAMP} == STAMP


def test_every_figure_is_drawn_where_there_is_something_to_draw(comparison):
    for name, make in comparison_figures.FIGURES.items():
        assert make(comparison) is not None, name
    bare = Contender(
        "dense", "every visible key", 0, None, 0, 512, ModelEvidence(made_up.losses(0.0))
    )
    only = Comparison("one", "made up", (bare,))
    drawn = {n for n, make in comparison_figures.FIGURES.items() if make(only) is not None}
    assert drawn == {"perplexity"}
    assert "Only dense was measured" in verdict(only)
    assert {row["metric"] for row in rows(only)} == {
        "loss", "perplexity", "cache", "added parameters", "training tokens",
    }  # fmt: skip


@pytest.mark.parametrize("slowest", [1.7, 4, 40, 4000])
def test_speed_can_be_read_off_its_axis(comparison, slowest):
    """Whatever lies between the fastest and the slowest, some ticks do, and not too many."""
    found = []
    for number, one in enumerate(comparison.contenders[:3]):
        milliseconds = 7.3 * slowest ** (number / 2)
        time = DecodeTime(1024, milliseconds, milliseconds, 16)
        found.append(replace(one, evidence=replace(one.evidence, decode=(time,))))
    figure = comparison_figures.quality_against_speed(replace(comparison, contenders=(*found,)))
    figure.draw_without_rendering()
    for ax in figure.axes:
        low, high = ax.get_xlim()
        assert 3 <= sum(low <= tick <= high for tick in ax.get_xticks()) <= 14


def test_the_page_shows_every_header(comparison):
    text = render(comparison, {})
    for name in MECHANISMS:
        assert title_of(name) in text
        for fact in FACTS:
            assert facts_of(name)[fact].replace("'", "&#x27;") in text, (name, fact)


def test_the_page_stands_alone(comparison, tmp_path, monkeypatch):
    made = {name: comparison_figures.FIGURES[name] for name in ("quality", "times", "selection")}
    monkeypatch.setattr(comparison_figures, "FIGURES", made)
    first, *_, last = comparison.contenders
    comparison = replace(comparison, contenders=(first, last))
    page = write_comparison(comparison, tmp_path, STAMP)
    text = page.read_text()
    assert page == tmp_path / "compare.html" and "A &amp; B" in text
    assert "http" not in text and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    for name in made:
        assert (tmp_path / "figures" / f"{name}.svg").stat().st_size > 0
    assert (tmp_path / "compare.json").stat().st_size > 0
    assert (tmp_path / "compare.csv").read_text() == as_csv(comparison, STAMP)


def test_the_same_comparison_is_the_same_page(comparison):
    make = comparison_figures.quality_against_speed
    pages = {render(comparison, {"quality": make(comparison)}) for _ in range(2)}
    assert len(pages) == 1


def test_the_verdict_ranks_by_what_was_measured(comparison):
    first, *others = comparison.contenders
    told = verdict(replace(comparison, contenders=(first, *reversed(others))))
    order = [told.index(f" {name} ") for name in MECHANISMS[1:]]
    assert order == sorted(order)
    assert "Right answers of 96 at 1,024 tokens: dense 96, window 90" in told


def test_other_texts_are_refused(comparison):
    first, second, *_ = comparison.contenders
    other = replace(second.evidence, perplexity=made_up.losses(0.0, texts=5))
    spoiled = replace(comparison, contenders=(first, replace(second, evidence=other)))
    with pytest.raises(ValueError):
        rows(spoiled)


def test_contenders_are_read_as_they_were_written(comparison, tmp_path):
    for contender in comparison.contenders:
        write_json(tmp_path / "one.json", contender)
        assert read_json(Contender, tmp_path / "one.json") == contender


@pytest.fixture(scope="module")
def measured():
    """Every mechanism, tiny and untrained."""
    plan = RetrievalPlan("abc " * 200, ("passkey",), (160,), (0.5,), examples_per_cell=1, seed=0)
    sizes = {"vocab_size": 258, "num_hidden_layers": 2, "eos_token_id": 256}
    found = []
    for name in ("dense", "window", "dsa"):
        model = tiny_model(**sizes)
        if name != "dense":
            hf.convert(model, SMALL[name])
        made = contend(
            model,
            byte_tokenizer(),
            tiny_tokens(2, 45),
            plan=plan if name == "dense" else None,
            train_tokens=7,
            lengths=Lengths((40,), (33,), (21,)),
        )
        found.append((model, made))
    return found


def test_measured_contenders_say_what_they_are(measured):
    (dense, first), (_, window), (model, dsa) = measured
    assert [c.mechanism for c in (first, window, dsa)] == ["dense", "window", "dsa"]
    assert first.config == "every visible key"
    assert "top_k=7" in dsa.config and "layers" not in dsa.config
    assert first.cache_bytes == window.cache_bytes == 2 * 2 * 2 * 16 * 4
    assert dsa.cache_bytes == first.cache_bytes + 2 * 16 * 4
    grown = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in dense.parameters())
    assert (first.added_parameters, window.added_parameters) == (0, 0)
    assert dsa.added_parameters == grown
    assert [(p.kind, p.num_tokens) for p in dsa.passes] == [("prefill", 33), ("training", 21)]
    assert first.evidence.retrieval is not None and window.evidence.retrieval is None
    assert dsa.evidence.recall is not None and window.evidence.recall is None
    assert dsa.selection is not None and window.selection is None and first.selection is None


def test_a_dense_model_is_timed_by_our_attention_and_comes_back(monkeypatch):
    model, ids, phases = tiny_model(num_hidden_layers=1), tiny_tokens(2, 45), []
    whole = comparison_module.pass_time

    def pass_time(model, *rest, **how):
        phases.append(hf.is_converted(model))
        return whole(model, *rest, **how)

    monkeypatch.setattr(comparison_module, "pass_time", pass_time)
    with torch.no_grad():
        before = model(ids).logits
    made = contend(model, None, ids, plan=None, train_tokens=0, lengths=Lengths((), (9,), (9,)))
    assert made.mechanism == "dense" and phases == [True, True]
    assert not hf.is_converted(model) and not model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_measured_contenders_are_compared(measured, tmp_path):
    found = Comparison("tiny", "random weights", tuple(made for _, made in measured))
    assert set(found.changes()) == {"window", "dsa"}
    for _, made in measured:
        write_json(tmp_path / "one.json", made)
        assert read_json(Contender, tmp_path / "one.json") == made
