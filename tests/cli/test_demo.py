"""The demo: every step leaves a file, nothing is done twice, and the page stands alone."""

import json
import re

import pytest

from openmsa.cli import demo_steps
from openmsa.cli.demo_steps import DemoPlan, run_demo
from openmsa.cli.door import UsageError

TINY = DemoPlan(
    warm_steps=2,
    sparse_steps=2,
    num_texts=2,
    text_tokens=512,
    contexts=(256,),
    depths=(0.5,),
    examples_per_cell=1,
    decode_contexts=(256,),
    story_tokens=512,
)
SECTIONS = ("perplexity", "retrieval", "recall", "selection", "decod", "training")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_steps, "QUICK", TINY)
        page = run_demo(folder, quick=True)
        yield folder, page


def test_the_page_stands_alone_and_tells_every_part(told):
    folder, page = told
    text = page.read_text()
    assert page == folder / "report.html"
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    for part in SECTIONS:
        assert part in text.lower()
    summary = json.loads((folder / "report.json").read_text())
    assert {"verdict", "criteria", "summary"} <= summary.keys()


def test_steps_that_are_done_are_not_done_again(told):
    folder, page = told
    models = sorted(folder.rglob("model.safetensors"))
    assert len(models) == 4  # two phases of the model and of its dense twin
    before = {path: path.stat().st_mtime_ns for path in [*models, *folder.glob("steps/*.json")]}
    assert len(before) == 4 + 6
    page.unlink()
    assert run_demo(folder, quick=True).exists()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_folder_of_another_demo_or_of_something_else_is_refused(told, tmp_path):
    folder, _ = told
    with pytest.raises(UsageError, match="holds a demo of another length"):
        run_demo(folder)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files but no demo"):
        run_demo(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.slow
def test_the_quick_demo_meets_its_criteria_and_its_control_fails(tmp_path):
    run_demo(tmp_path / "out", quick=True)
    judged = json.loads((tmp_path / "out" / "report.json").read_text())["criteria"]
    holds = {criterion["name"]: criterion["holds"] for criterion in judged}
    assert holds["score recall"] and holds["control"] and holds["a solved task"]
