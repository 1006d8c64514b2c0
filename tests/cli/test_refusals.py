"""Bad input: a clear line and the right code before work starts, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from openmsa.cli import main

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def refused(capsys):
    """Run a command that must fail; return its one line of explanation."""

    def run(code: int, *arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == code
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return told

    return run


@pytest.fixture
def copy(dense, tmp_path):
    return shutil.copytree(dense, tmp_path / "copy")


VERBS_ON_A_MODEL = (
    ("convert", "--out", "OUT"),
    ("generate", "--prompt", "x"),
    ("evaluate",),
    ("inspect",),
    ("train", "--recipe", "dense-byte-3m", "--out", "OUT", "--model"),
)


@pytest.mark.parametrize("command", VERBS_ON_A_MODEL, ids=lambda command: command[0])
def test_a_model_that_is_not_there(refused, tmp_path, command):
    out = [str(tmp_path / "out") if part == "OUT" else part for part in command]
    assert "there is no folder" in refused(2, *out, "./nowhere")
    assert "no config.json" in refused(2, *out, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block-size", "0"], "--block-size"),
        (["--top-k", "two"], "--top-k"),
        (["--top-k", "2", "--local-blocks", "2", "--sink-blocks", "1"], "top_k=2 cannot hold"),
        (["--layers", "3-1"], "--layers"),
        (["--init", "lucky"], "--init"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "cuda:77"], "GPUs here"),
        (["--to-dense"], "dense already"),
        (["--layers", "auto", "--threshold", "1.5"], "--threshold"),
        (["--layers", "auto", "--context-tokens", "9999"], "256 positions"),
        (["--layers", "auto", "--block-size", "64", "--top-k", "9"], "fit the budget"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_convert_refuses(refused, dense, tmp_path, flags, message):
    assert message in refused(2, "convert", dense, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_convert_refuses_layers_that_are_not_there(refused, dense, tmp_path):
    out = tmp_path / "out"
    assert "layers" in refused(1, "convert", dense, "--out", out, "--layers", "0,7")
    assert not out.exists()


def test_convert_refuses_an_msa_model(refused, msa, tmp_path):
    assert "MSA already" in refused(2, "convert", msa, "--out", tmp_path / "out")


def test_convert_keeps_what_out_holds(refused, dense, tmp_path):
    kept = tmp_path / "out" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("kept")
    assert "--overwrite" in refused(2, "convert", dense, "--out", kept.parent)
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("verb", ["convert", "train"])
def test_a_full_disk_is_noticed_before_the_work(refused, dense, tmp_path, monkeypatch, verb):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(100, 99, 4096))
    rest = {"convert": [dense], "train": ["--recipe", "dense-byte-3m"]}[verb]
    out = tmp_path / "out"
    assert "make room" in refused(1, verb, *rest, "--out", out)
    assert not out.exists()


def test_a_disk_that_fills_while_saving_leaves_no_half_model(refused, dense, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert main(["convert", str(dense), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    command = ("convert", dense, "--out", out, "--overwrite", "--top-k", "3")
    assert "No space left" in refused(1, *command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_checkpoint_is_named(refused, copy, tmp_path):
    file = copy / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)

    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    told = refused(1, "generate", copy, "--prompt", "x")
    assert "model.norm.weight" in told and "NaN" in told

    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    told = refused(1, "convert", copy, "--out", tmp_path / "out")
    assert "lacks 1 weights" in told and "model.norm.weight" in told

    file.write_bytes(whole[: len(whole) // 2])
    assert "cannot load" in refused(1, "generate", copy, "--prompt", "x")


def test_weights_of_another_model_are_named(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    assert "cannot load" in refused(1, "generate", copy, "--prompt", "x")


def test_an_unknown_model_type_is_named(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    assert "abacus" in refused(1, "generate", copy, "--prompt", "x")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--prompt", ""], 2, "prompt is empty"),
        (["--file", "nowhere.txt"], 2, "no file nowhere.txt"),
        (["--prompt", "x", "--file", "y"], 2, "not allowed with"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature=-1.0"),
        (["--prompt", "x", "--top-p", "0"], 2, "top_p=0.0"),
        (["--prompt", "x" * 300], 1, "256 positions"),
        (["--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_generate_refuses(refused, dense, flags, code, message):
    assert message in refused(code, "generate", dense, *flags)


def test_texts_that_say_nothing(refused, dense, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00\x81")
    budget = ("--block-size", 8, "--top-k", 4)
    for file, message in ((empty, "is empty"), (binary, "not UTF-8"), (tmp_path, "no file")):
        for verb in ("inspect", "evaluate"):
            rest = budget if verb == "inspect" else ()
            assert message in refused(2, verb, dense, "--text", file, *rest)
    empty.write_text("too short")
    told = refused(2, "inspect", dense, "--text", empty, *budget)
    assert "9 tokens" in told or "10 tokens" in told


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--what", "beauty"], 2, "beauty"),
        (["--tasks", "chess"], 2, "chess"),
        (["--depths", "0,2"], 2, "--depths"),
        (["--context-tokens", "9999", "--what", "perplexity"], 1, "256"),
        (["--lengths", "9999", "--what", "retrieval"], 1, "256"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_refuses(refused, dense, flags, code, message):
    assert message in refused(code, "evaluate", dense, *flags)


def test_evaluate_refuses_models_with_other_tokens(refused, dense, copy):
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary["A"] = vocabulary["A"], vocabulary["!"]
    path.write_text(json.dumps(content))
    assert "different tokens" in refused(2, "evaluate", dense, copy, "--what", "perplexity")


def test_a_checkpoint_without_its_tokenizer(refused, copy):
    """Trainer's checkpoints are such; transformers would hand out an empty tokenizer."""
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer" in refused(1, "generate", copy, "--prompt", "words")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "dense-bite-3m"], "did you mean dense-byte-3m"),
        (["--recipe", "nowhere.json"], "no file nowhere.json"),
        (["--recipe", "dense-byte-3m"], "--out FOLDER"),
        (["--recipe", "dense-byte-3m", "--set", "sede=1"], "did you mean 'seed'"),
        (["--recipe", "dense-byte-3m", "--set", "phases.0.stepz=1"], "did you mean 'steps'"),
        (["--recipe", "dense-byte-3m", "--set", "phases.9.steps=1"], "there is no '9'"),
        (["--recipe", "dense-byte-3m", "--set", "seed"], "KEY=VALUE"),
        (["--recipe", "dense-byte-3m", "--set", "precision=fp7"], "fp32, bf16"),
        (["--recipe", "dense-byte-3m", "--layers", "auto", "--out", "x"], "convert first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses(refused, flags, message):
    assert message in refused(2, "train", *flags)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is no json"),
        ("a.yaml", "a: [", "is no yaml"),
        ("a.json", "[1]", "holds no recipe"),
        ("a.yaml", "name: x\nphasez: []", "did you mean 'phases'"),
        ("a.yaml", "name: x\nphases: 3", "phases"),
        ("a.json", '{"name": "x", "phases": [{"name": "p", "steps": "many"}]}', "steps"),
    ],
)
def test_a_recipe_that_is_none(refused, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    told = refused(2, "train", "--recipe", tmp_path / name, "--print-recipe")
    assert message in told


def test_demo_refuses_a_file_and_a_full_disk(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(2, "demo", "--out", tmp_path / "file")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(100, 99, 4096))
    assert "make room" in refused(1, "demo", "--out", tmp_path / "out")
