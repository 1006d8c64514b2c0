"""Every mechanism through the verbs: converted, trained, looked into, judged and read from."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from transformers import AutoModelForCausalLM

from openmsa import hf
from openmsa.cli import main
from openmsa.cli.mechanisms import CONFIGS, DEFAULTS, NUMBERS
from openmsa.training.byte_tokenizer import byte_tokenizer
from tests.cli.conftest import tiny_byte_model
from tests.hf.mechanisms import SMALL

SMALL_OPTIONS = {
    "nsa": "--kernel 4 --stride 2 --block-size 4 --top-k 4 --window 6",
    "moba": "--block-size 4 --top-k 3",
    "infllm2": "--kernel 4 --stride 2 --block-size 4 --top-k 4 --local-blocks 1 --dense-below 0",
    "dsa": "--top-k 7 --index-heads 4 --d-index 16",
    "window": "--window 7 --sinks 2",
}
every_other = pytest.mark.parametrize("name", SMALL_OPTIONS)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a tiny model of a mechanism, saved when first asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("mechanisms") / name.replace(" ", "_")
            hf.convert(tiny_byte_model(), SMALL[name]).save_pretrained(made[name])
            byte_tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


def test_names_defaults_and_meanings_are_the_configs():
    assert set(DEFAULTS) == set(CONFIGS) == set(hf.ROOMS)
    for name, room in hf.ROOMS.items():
        kept = {f.name: f.default for f in fields(room.CONFIG) if f.name != "layers"}
        assert DEFAULTS[name] == kept, name
        assert CONFIGS[name] == room.CONFIG.__name__
    assert set(NUMBERS) == {field for kept in DEFAULTS.values() for field in kept}


@every_other
def test_convert_and_back(name, dense, tmp_path, capsys):
    command = ["convert", str(dense), "--out", str(tmp_path / "a"), "--mechanism", name]
    assert main([*command, *SMALL_OPTIONS[name].split(), "--layers", "0,2"]) == 0
    shown = capsys.readouterr().out
    assert name in shown and "2 of 3: 0,2" in shown
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert hf.mechanism_of(model) == name and hf.msa_layers(model) == [0, 2]
    assert {**vars(hf.config_of(model)), "layers": None} == vars(SMALL[name])
    again = ["convert", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    assert main(again) == 2
    assert f"is {name} already" in capsys.readouterr().err
    assert main([*again, "--to-dense"]) == 0
    assert not hf.is_converted(AutoModelForCausalLM.from_pretrained(tmp_path / "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mechanism moba --window 4", "--window is no option of moba, which has --block-size"),
        ("--kernel 4", "--kernel is no option of msa, which has --block-size, --top-k, --d-index"),
        ("--mechanism nsa --layers auto", "--layers auto judges by an MSA index"),
        ("--mechanism nsa --kernel 5", "kernel=5 must be a multiple of stride=16"),
    ],
)
def test_options_that_do_not_belong_are_refused(options, message, dense, tmp_path, capsys):
    assert main(["convert", str(dense), "--out", str(tmp_path / "a"), *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_numbers_that_do_not_fit_the_model_are_refused(dense, tmp_path, capsys):
    command = ["convert", str(dense), "--out", str(tmp_path / "a"), "--mechanism", "dsa"]
    assert main(command) == 1
    assert "use DSAConfig(d_index=16)" in capsys.readouterr().err


SHORT = [
    f"phases.{phase}.{change}"
    for phase in (0, 1)
    for change in ("steps=1", "seq_len=64", "batch_size=1", "warmup_steps=0")
]


def train(name, dense, out, text, recipe="msa-cpt"):
    command = ["train", "--recipe", recipe, "--model", str(dense), "--out", str(out)]
    command += ["--mechanism", name, *SMALL_OPTIONS[name].split(), "--data", str(text)]
    changes = [*SHORT, "data.retrieval_share=0"] if recipe == "msa-cpt" else []
    for change in changes:
        command += ["--set", change]
    return main(command)


@pytest.mark.parametrize("name", ["nsa", "moba", "dsa"])
def test_train_fits_its_phases_to_the_mechanism(name, dense, text, tmp_path, capsys):
    assert train(name, dense, tmp_path / "run", text) == 0
    shown = capsys.readouterr().err
    phases = json.loads((tmp_path / "run" / "recipe.json").read_text())["phases"]
    warm = ("warmup", "index") if name == "dsa" else ("sparse", "all")
    assert (phases[0]["attention"], phases[0]["trained"]) == warm
    assert ("has no warm-up" in shown) == (name != "dsa")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "1-sparse" / "model")
    assert hf.mechanism_of(model) == name
    logged = json.loads((tmp_path / "run" / "history.json").read_text())
    assert any("kl/layer_0" in line for line in logged) == (name == "dsa")
    assert train("window", tmp_path / "run" / "1-sparse" / "model", tmp_path / "no", text) == 2
    assert f"is {name} already, not window" in capsys.readouterr().err


def test_train_keeps_to_a_recipe_of_yours(dense, text, tmp_path, capsys):
    warm = {"name": "warm", "attention": "warmup", "steps": 1, "seq_len": 64, "batch_size": 1}
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "data": {}, "phases": [warm]}))
    assert train("moba", dense, tmp_path / "run", text, str(tmp_path / "mine.json")) == 1
    assert "needs attention='warmup', which moba lacks" in capsys.readouterr().err


def test_inspect_shows_what_there_is(folder_of, text, tmp_path, capsys):
    reading = ["--text", str(text), "--num-sequences", "1", "--context-tokens", "100"]
    for name, groups in (("dsa", 1), ("moba", 4), ("nsa", 2), ("infllm2", 2)):
        out = tmp_path / name
        assert main(["inspect", str(folder_of(name)), "--out", str(out), *reading]) == 0
        kept = json.loads((out / "inspection.json").read_text())
        assert ("recall" in kept) == (name == "dsa")
        assert [len(layer) for layer in kept["selection_map"]["probability"]] == [groups] * 3
        shown = capsys.readouterr().err
        assert ("has no index, so there is no recall" in shown) == (name != "dsa")
    assert main(["inspect", str(folder_of("window")), *reading]) == 2
    assert "reads by position alone (window)" in capsys.readouterr().err
    assert main(["inspect", str(folder_of("window and blocks")), *reading]) == 0


def test_evaluate_and_generate_take_them_all(folder_of, text, tmp_path, capsys):
    models = [str(folder_of(name)) for name in ("window", "dsa", "nsa")]
    small = ["--context-tokens", "64", "--num-sequences", "2", "--text", str(text)]
    asked = ["--what", "perplexity,recall", "--out", str(tmp_path / "judged")]
    assert main(["evaluate", *models, *small, *asked]) == 0
    kept = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert {row["model"] for row in kept["perplexity"]} == {"window", "dsa", "nsa"}
    assert {row["model"] for row in kept["recall"]} == {"dsa"}
    for model in models:
        command = ["generate", model, "--prompt", "hello world, hello", "--max-new-tokens", "5"]
        assert main([*command, "--prefill-tokens", "7"]) == 0
