"""The comparison: every mechanism on one page, nothing done twice, other folders left alone."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from openmsa.cli import compare, compare_steps, main
from openmsa.cli.compare_plan import BUDGET, PLANS, ComparePlan, configs
from openmsa.evaluation import comparison_figures
from openmsa.evaluation.comparison import Lengths
from openmsa.evaluation.headers import FACTS, MECHANISMS, facts_of
from openmsa.training import Recipe, data


@dataclass(frozen=True)
class TinyPlan(ComparePlan):
    """Steps of one short sequence each."""

    @property
    def recipe(self) -> Recipe:
        made = super().recipe
        phases = (replace(phase, seq_len=192, batch_size=1) for phase in made.phases)
        return replace(made, phases=tuple(phases), precision="fp32")


SMALL = {"depths": (0.5,), "examples_per_cell": 1, "tasks": ("passkey",)}
TINY = {
    "dense": TinyPlan(
        "dense",
        1,
        1,
        2,
        160,
        contexts=(200,),
        lengths=Lengths((64, 192), (64, 192), (96,)),
        **SMALL,
    ),
    "scratch": TinyPlan("scratch", 1, 1, 2, 96),
}
MEASURED = {
    "passkey": 1,
    "decode": 2,
    "prefill": 2,
    "training": 1,
    "cache": 1,
    "perplexity": 1,
    "added parameters": 1,
    "training tokens": 1,
}


TEXT = "\n".join(f"line {n}: number {n * 7919 % 101} of a hundred" for n in range(200))
DRAWN = {
    name: comparison_figures.FIGURES[name] for name in ("quality", "perplexity")
}  # the rest: evaluation


def compared(*options) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_figures, "FIGURES", DRAWN)
        for module in (data, compare_steps):
            patch.setattr(module, "standard_library_text", lambda split="train": [TEXT])
        for start, plan in TINY.items():
            patch.setitem(PLANS, (start, True), plan)
        return main(["compare", "--quick", *map(str, options)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    assert compared("--mechanism", "msa", "--out", out) == 0
    return out


def rows_of(folder) -> list[dict]:
    return list(csv.DictReader((folder / "compare.csv").read_text().splitlines()))


def test_the_page_stands_alone(folder):
    page = (folder / "compare.html").read_text()
    assert "http" not in page and "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for name in DRAWN:
        assert f'id="{name}"' in page, name
    assert page.count("<svg") == len(DRAWN)
    for name in ("dense", "msa"):
        for fact in FACTS:
            assert facts_of(name)[fact].replace("'", "&#x27;") in page, (name, fact)
    assert "moba" not in page


def test_figures_lie_beside_it(folder):
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in DRAWN for kind in ("png", "svg")}


def test_a_row_is_one_number(folder):
    rows = rows_of(folder)
    assert {row["mechanism"] for row in rows} == {"dense", "msa"}
    for name in ("dense", "msa"):
        counted = Counter(row["metric"] for row in rows if row["mechanism"] == name)
        assert {metric: counted[metric] for metric in MEASURED} == MEASURED
        assert ("score recall" in counted) == ("perplexity change" in counted) == (name == "msa")
    keys = [(row["mechanism"], row["metric"], row["context"]) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        float(row["value"])
        assert row["start"] == "dense" and row["date"] and row["commit"] and row["device"]
        assert row["command"].startswith("openmsa ")


def test_all_see_the_same_tokens_and_the_cache_is_counted(folder):
    values = {
        (row["mechanism"], row["metric"]): float(row["value"])
        for row in rows_of(folder)
        if row["metric"] in MEASURED
    }
    assert values["dense", "training tokens"] == values["msa", "training tokens"] == 2 * 192
    told = json.loads(
        (folder / "models" / "dense" / "1-sparse" / "model" / "config.json").read_text()
    )
    layers, d = told["num_hidden_layers"], told["head_dim"]
    dense = layers * 2 * told["num_key_value_heads"] * d * 4  # fp32 keys and values
    assert values["dense", "cache"] == dense
    assert values["msa", "cache"] == dense + layers * d * 4  # an index key as wide as a head
    assert values["dense", "added parameters"] == 0 < values["msa", "added parameters"]


def test_what_is_done_is_not_done_again(folder, capsys):
    kept = [*folder.rglob("*.safetensors"), *folder.glob("measured/*.json")]
    assert len(kept) == 2 * 2 + 2
    before = {path: path.stat().st_mtime_ns for path in kept}
    (folder / "compare.html").unlink()
    assert compared("--mechanism", "msa", "--out", folder) == 0
    assert (folder / "compare.html").is_file()
    assert "training" not in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_mechanism_is_added_without_the_others_again(folder, tmp_path, capsys):
    out = shutil.copytree(folder, tmp_path / "out")
    assert compared("--mechanism", "msa", "window", "--out", out) == 0
    told = capsys.readouterr().err
    assert "window: training, 384 tokens" in told and "msa: training" not in told
    assert {row["mechanism"] for row in rows_of(out)} == {"dense", "window", "msa"}


def test_folders_of_something_else_are_refused(folder, tmp_path, capsys):
    assert main(["compare", "--quick", "--out", str(folder)]) == 2
    assert "holds another comparison" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert compared("--out", tmp_path) == 2
    assert "holds files but no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert compared("--out", tmp_path / "notes.txt") == 2


def test_from_random_weights_there_is_perplexity_only(tmp_path):
    assert compared("--mechanism", "window", "--start", "scratch", "--out", tmp_path / "s") == 0
    rows = rows_of(tmp_path / "s")
    assert {row["start"] for row in rows} == {"scratch"}
    assert not {row["metric"] for row in rows} & {"passkey", "decode", "prefill", "training"}
    page = (tmp_path / "s" / "compare.html").read_text()
    assert 'id="perplexity"' in page and 'id="quality"' not in page


def test_every_mechanism_has_a_place_in_the_plan():
    assert compare.MECHANISMS == MECHANISMS
    assert set(configs()) == set(MECHANISMS) - {"dense"}
    assert configs()["msa"].block_size * configs()["msa"].top_k == BUDGET
    assert set(PLANS) == {(start, quick) for start in ("dense", "scratch") for quick in (0, 1)}
