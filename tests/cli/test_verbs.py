"""Each verb does its work on a tiny model and leaves the files that it promises."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from openmsa import hf
from openmsa.cli import main


def weights(folder) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


BUDGET = ["--block-size", "8", "--top-k", "4"]


def test_convert_and_back_gives_the_dense_model(dense, tmp_path, capsys):
    assert main(["convert", str(dense), "--out", str(tmp_path / "msa"), *BUDGET]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "msa")
    assert hf.is_msa(model) and hf.msa_layers(model) == [0, 1, 2]
    assert (hf.msa_config(model).block_size, hf.msa_config(model).top_k) == (8, 4)
    assert (tmp_path / "msa" / "tokenizer.json").is_file()
    assert "3 of 3: 0-2" in capsys.readouterr().out

    assert main(["convert", str(tmp_path / "msa"), "--out", str(tmp_path / "b"), "--to-dense"]) == 0
    assert same(weights(tmp_path / "b"), weights(dense))


def test_convert_keeps_to_the_model_where_there_is_no_tokenizer(dense, tmp_path, capsys):
    bare = shutil.copytree(dense, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["convert", str(bare), "--out", str(tmp_path / "msa"), *BUDGET]) == 0
    assert not list((tmp_path / "msa").glob("tokenizer*"))
    auto = ["convert", str(bare), "--out", str(tmp_path / "b"), *BUDGET, "--layers", "auto"]
    assert main(auto) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_convert_takes_the_layers_it_is_told(dense, tmp_path):
    command = ["convert", str(dense), "--out", str(tmp_path / "msa"), *BUDGET, "--layers", "0,2"]
    assert main(command) == 0
    assert hf.msa_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "msa")) == [0, 2]


def test_convert_auto_leaves_out_what_would_not_bear_it(dense, tmp_path, text, capsys):
    out, look = tmp_path / "msa", tmp_path / "look"
    reading = [*BUDGET, "--text", str(text), "--num-sequences", "2"]
    assert main(["inspect", str(dense), "--out", str(look), *reading]) == 0
    mass = [
        layer["oracle_mass"]
        for layer in json.loads((look / "inspection.json").read_text())["bearing"]["layers"]
    ]
    between = str(sum(sorted(mass)[:2]) / 2)
    auto = ["--layers", "auto", "--threshold", between]
    assert main(["convert", str(dense), "--out", str(out), *reading, *auto]) == 0
    kept = hf.msa_layers(AutoModelForCausalLM.from_pretrained(out))
    assert kept == [layer for layer in range(3) if mass[layer] >= float(between)]

    none = ["--layers", "auto", "--threshold", "1.0"]
    assert main(["convert", str(dense), "--out", str(tmp_path / "no"), *reading, *none]) == 1
    assert "no layer would bear" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_generate_streams_the_same_from_prompt_file_and_input(msa, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("hello world")
    told = []
    for source in (["--prompt", "hello world"], ["--file", str(tmp_path / "prompt.txt")], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello world"))
        command = ["generate", str(msa), *source, "--max-new-tokens", "12", "--out", str(tmp_path)]
        assert main(command) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2]
    kept = json.loads((tmp_path / "generation.json").read_text())
    assert kept["text"] + "\n" == told[0]
    assert (kept["prompt_tokens"], len(kept["tokens"])) == (11, 12)


def test_inspect_maps_what_an_msa_model_selects(msa, tmp_path, text, capsys):
    assert main(["inspect", str(msa), "--text", str(text), "--out", str(tmp_path / "look")]) == 0
    kept = json.loads((tmp_path / "look" / "inspection.json").read_text())
    assert len(kept["selection_map"]["probability"]) == len(kept["recall"]["layers"]) == 3
    assert {path.suffix for path in (tmp_path / "look").iterdir()} == {".json", ".png", ".svg"}
    assert "Recall of the index" in capsys.readouterr().out


def test_evaluate_puts_models_side_by_side(dense, msa, text, tmp_path, capsys):
    small = ["--context-tokens", "128", "--num-sequences", "3", "--text", str(text)]
    asked = ["--tasks", "passkey,key_value", "--lengths", "128", "--depths", "0,1"]
    few = ["--examples", "1", "--out", str(tmp_path / "judged")]
    assert main(["evaluate", str(dense), str(msa), *small, *asked, *few]) == 0
    kept = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert {row["model"] for row in kept["perplexity"]} == {"dense", "msa"}
    assert {row["task"] for row in kept["retrieval"]} == {"passkey", "key_value"}
    assert {row["model"] for row in kept["recall"]} == {"msa"}
    for figure in ("perplexity.svg", "perplexity.png", "retrieval.svg", "retrieval.png"):
        assert (tmp_path / "judged" / figure).stat().st_size > 0
    shown = capsys.readouterr().out
    assert "change" in shown and "key value" in shown


def test_evaluate_finds_no_change_between_a_model_and_itself(dense, text, tmp_path, capsys):
    small = ["--context-tokens", "64", "--num-sequences", "2", "--text", str(text)]
    assert main(["evaluate", str(dense), str(dense), *small, "--what", "perplexity"]) == 0
    assert "+0.00%" in capsys.readouterr().out


RECIPE = {
    "name": "tiny",
    "precision": "fp32",
    "log_every": 1,
    "save_every": 2,
    "data": {"retrieval_share": 0.0},
    "phases": [
        {"name": "warm", "attention": "warmup", "trained": "index", "seq_len": 64},
        {"name": "sparse", "attention": "sparse", "seq_len": 64},
    ],
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.json"
    for phase in RECIPE["phases"]:
        phase |= {"steps": 2, "batch_size": 1}
    path.write_text(json.dumps(RECIPE))
    return path


def test_train_converts_trains_tells_and_resumes(dense, text, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--recipe", str(recipe), "--model", str(dense), "--out", str(out)]
    command += [*BUDGET, "--data", str(text), "--probe-every", "1"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Trained by tiny" in shown and "{'" not in shown
    assert hf.is_msa(AutoModelForCausalLM.from_pretrained(out / "1-sparse" / "model"))
    lines = json.loads((out / "history.json").read_text())
    assert {"warm", "sparse"} == {line["phase"] for line in lines}
    assert any("score_recall" in line for line in lines)
    assert {"losses.svg", "losses.png", "recall.svg"} <= {path.name for path in out.iterdir()}

    before = (out / "1-sparse" / "model" / "model.safetensors").read_bytes()
    assert main(command) == 0
    assert "already done" in capsys.readouterr().err
    assert (out / "1-sparse" / "model" / "model.safetensors").read_bytes() == before


def test_train_names_every_recipe():
    from openmsa.cli.train import RECIPE_NAMES
    from openmsa.training import RECIPES

    assert set(RECIPE_NAMES) == set(RECIPES)


def test_train_prints_a_recipe_that_it_reads_again(recipe, tmp_path, capsys):
    change = ["--set", "phases.sparse.steps=9", "--set", "phases.0.learning_rate=0.5"]
    assert main(["train", "--recipe", str(recipe), "--print-recipe", *change]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.json").write_text(printed)
    again = json.loads(printed)
    assert (again["phases"][1]["steps"], again["phases"][0]["learning_rate"]) == (9, 0.5)
    assert main(["train", "--recipe", str(tmp_path / "again.json"), "--print-recipe"]) == 0
    assert capsys.readouterr().out == printed


def test_env_says_why_a_backend_is_not_usable(tmp_path, capsys):
    assert main(["env", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "env.json").read_text())
    assert facts["backends"]["reference"] is None
    assert all(why is None or len(why) > 10 for why in facts["backends"].values())
    assert facts["packages"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert all(name in shown for name in facts["backends"])
