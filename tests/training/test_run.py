"""A run that is killed goes on as if nothing had happened; accumulation changes no loss."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from openmsa.hf import convert
from openmsa.mechanisms.msa import MSAConfig
from openmsa.training import DataConfig, Phase, Recipe, history, train
from openmsa.training.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from openmsa.training.checkpoints import damage, last_whole_checkpoint

LINES = "\n".join(f"def function_{i}(x, y): return x * {i} + y" for i in range(200))


def tiny_model(sparse=True):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    return convert(model, MSAConfig(block_size=8, top_k=3)) if sparse else model


def tiny_recipe(source, **changes):
    common = {"seq_len": 64, "batch_size": 2, "warmup_steps": 1}
    settings = {
        "name": "tiny",
        "phases": (
            Phase("warm", attention="warmup", trained="index", steps=4, **common),
            Phase("sparse", attention="sparse", steps=6, accumulate=2, schedule="cosine", **common),
        ),
        "data": DataConfig(source=str(source), retrieval_share=0.3),
        "log_every": 2,
        "save_every": 2,
        "precision": "fp32",
    }
    return Recipe(**(settings | changes))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.txt"
    path.write_text(LINES)
    return path


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def quiet(line):
    pass


def run(recipe, out, **more):
    return train(recipe, model=tiny_model(), tokenizer=byte_tokenizer(), out=out, say=quiet, **more)


def test_phases_train_what_they_say_and_log_the_index(source, tmp_path):
    before = weights(tiny_model())
    probed = []

    def probe(model):
        assert not model.training
        probed.append(model)
        return {"score_recall": 0.5}

    run(tiny_recipe(source), tmp_path / "out", probe=probe, probe_every=2)
    from transformers import AutoModelForCausalLM

    warm = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "0-warm" / "model"))
    sparse = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "1-sparse" / "model"))
    moved = {name for name in before if not torch.equal(before[name], warm[name])}
    assert moved and all("index_" in name for name in moved)
    assert all(not torch.equal(warm[name], sparse[name]) for name in before if "_proj" in name)
    lines = history(tmp_path / "out")
    trained = [line for line in lines if "loss" in line]
    assert {"lm_loss", "kl/layer_0", "kl/layer_1"} <= trained[-1].keys()
    assert all(0 < line["kl/layer_0"] < 5 and 3 < line["lm_loss"] < 8 for line in trained)
    assert lines[-1]["tokens"] == 4 * 2 * 64 + 6 * 2 * 2 * 64
    assert sum("score_recall" in line for line in lines) == len(probed) == 3 + 4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "1-sparse" / "model")
    assert saved.config.use_cache


def test_killed_at_any_moment_it_resumes_bit_for_bit(source, tmp_path):
    whole = weights(run(tiny_recipe(source), tmp_path / "whole"))
    out = tmp_path / "killed"
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_run import run, tiny_recipe
run(tiny_recipe(Path({str(source)!r})), {str(out)!r})
"""
    killed = 0
    for first, second in (("0-warm", "checkpoint-2"), ("1-sparse", "checkpoint-4")):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if (out / first / second).exists():
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.002)
        process.wait()
    assert killed == 2
    assert_same(whole, weights(run(tiny_recipe(source), out)))


def test_a_damaged_checkpoint_is_passed_over_and_nothing_changes(source, tmp_path):
    recipe = tiny_recipe(source)
    whole = weights(run(recipe, tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop(model):
        if len(list((tmp_path / "out" / "1-sparse").glob("checkpoint-*"))) == 2:
            raise Stop
        return {}

    with pytest.raises(Stop):
        run(recipe, tmp_path / "out", probe=stop, probe_every=1)
    newest, _ = last_whole_checkpoint(tmp_path / "out" / "1-sparse")
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = []
    again = train(
        recipe,
        model=tiny_model(),
        tokenizer=byte_tokenizer(),
        out=tmp_path / "out",
        say=said.append,
    )
    assert any("model.safetensors has changed or is cut short" in line for line in said)
    assert_same(whole, weights(again))


@pytest.mark.parametrize("attention", ["warmup", "sparse"])
def test_accumulated_and_checkpointed_steps_equal_plain_ones(source, tmp_path, attention):
    def trained(folder, **changes):
        phase = Phase(
            "only", attention=attention, steps=3, seq_len=64, batch_size=4, warmup_steps=1
        )
        recipe = tiny_recipe(source, phases=(replace(phase, **changes),), log_every=1)
        model = run(recipe, tmp_path / folder)
        return weights(model), [line for line in history(tmp_path / folder) if "loss" in line]

    plain, plain_log = trained("plain")
    for folder, changes in {
        "accumulated": {"batch_size": 1, "accumulate": 4},
        "recomputed": {"checkpoint_activations": True},
    }.items():
        other, other_log = trained(folder, **changes)
        for name in plain:
            torch.testing.assert_close(other[name], plain[name], rtol=1e-3, atol=2e-5)
        for a, b in zip(plain_log, other_log, strict=True):
            for key in ("loss", "lm_loss", "grad_norm", "kl/layer_0", "kl/layer_1"):
                assert a[key] == pytest.approx(b[key], rel=1e-4), (folder, key)


def test_done_phases_are_not_done_again(source, tmp_path):
    one = weights(run(tiny_recipe(source), tmp_path / "out"))
    stamp = (tmp_path / "out" / "1-sparse" / "model" / "model.safetensors").stat().st_mtime_ns
    said = []
    again = train(
        tiny_recipe(source),
        model=tiny_model(),
        tokenizer=byte_tokenizer(),
        out=tmp_path / "out",
        say=said.append,
    )
    assert said[1:] == ["phase warm: already done", "phase sparse: already done"]
    assert_same(one, weights(again))
    model = tmp_path / "out" / "1-sparse" / "model"
    assert (model / "model.safetensors").stat().st_mtime_ns == stamp
    assert damage(model) is None and not list(model.parent.glob("checkpoint-*"))


def test_wrong_beginnings_are_refused_before_work(source, tmp_path):
    recipe = tiny_recipe(source)
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"phase 'warm' needs attention='warmup' but the model is"):
        train(recipe, model=tiny_model(sparse=False), tokenizer=tokenizer, out=tmp_path / "a")
    long = replace(recipe, phases=(replace(recipe.phases[0], seq_len=40_000),))
    with pytest.raises(ValueError, match="seq_len=40000 .*max_position_embeddings=32768"):
        run(long, tmp_path / "a")
    broken = tiny_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds NaN"):
        train(recipe, model=broken, tokenizer=tokenizer, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(recipe, tmp_path / "full")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "recipe.json").write_text(json.dumps(replace(recipe, seed=7).to_dict()))
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        run(recipe, tmp_path / "b")


def test_a_full_disk_is_told_before_work(source, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match="0.0 GB free, this run needs"):
        run(tiny_recipe(source), tmp_path / "out")
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_a_loss_that_explodes_ends_the_run_with_an_error(source, tmp_path):
    phase = Phase("hot", steps=6, seq_len=64, batch_size=2, learning_rate=1e30, warmup_steps=1)
    recipe = tiny_recipe(source, phases=(phase,), log_every=1)
    with pytest.raises(ValueError, match="lower learning_rate"):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize("sparse", [True, False])
def test_what_comes_back_computes_as_what_was_saved(source, tmp_path, sparse):
    """The autocast of the training is not left on it."""
    phases = (Phase("one", "sparse" if sparse else "dense", steps=1, seq_len=64, batch_size=1),)
    recipe = tiny_recipe(source, phases=phases, precision="bf16")
    made = train(recipe, model=tiny_model(sparse), tokenizer=byte_tokenizer(), out=tmp_path / "run")
    loaded = Qwen3ForCausalLM if not sparse else type(made)
    loaded = loaded.from_pretrained(tmp_path / "run" / "0-one" / "model")
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(made.eval()(ids).logits, loaded(ids).logits)
    assert "forward" not in vars(made)
