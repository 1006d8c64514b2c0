"""A recipe run by several processes: the weights and the log of one, whoever dies in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import openmsa.hf  # noqa: F401
from openmsa.training import Phase, history
from openmsa.training.checkpoints import SEAL, damage
from openmsa.training.parallel import Processes
from tests.training.test_run import LINES, run, tiny_recipe

ROOT = Path(__file__).parents[2]
KEYS = ("loss", "lm_loss", "grad_norm", "learning_rate", "kl/layer_0", "kl/layer_1")
PROGRAM = """
import sys
from pathlib import Path
from transformers import TrainerCallback
from openmsa.training.parallel import join
from tests.training.test_parallel_run import recipe
from tests.training.test_run import run

class Told(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        print(Path(args.output_dir).name, "begins at", state.global_step, flush=True)


processes = join(shard={shard}, context={context})
run(recipe(Path({source!r})), {out!r}, processes=processes, callbacks=(Told(),){more})
print("done", processes.rank, flush=True)
"""
LINGERING = """, probe=lambda model: __import__("time").sleep(0.2) or {}, probe_every=1"""


def recipe(source: Path):
    """8 sequences a step: 1, 2 and 4 processes share them in 4, 2 and 1 passes."""
    common = {"seq_len": 48, "batch_size": 2, "accumulate": 4, "warmup_steps": 1}
    phases = (
        Phase("warm", attention="warmup", trained="index", steps=3, **common),
        Phase("sparse", attention="sparse", steps=4, schedule="cosine", **common),
    )
    return tiny_recipe(source, phases=phases, log_every=1, save_every=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "source.txt"
    path.write_text(LINES)
    return path


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The folder of the run of a single process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run(recipe(source), out)
    return out


def launch(size: int, source: Path, out: Path, *, shard=False, context=1, more="", **how):
    program = PROGRAM.format(
        shard=shard, context=context, source=str(source), out=str(out), more=more
    )
    path = out.with_suffix(".py")
    path.write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*torchrun, f"--nproc-per-node={size}", str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **how,
    )


def finished(process) -> str:
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def assert_as_alone(out: Path, alone: Path) -> None:
    """The same lines in the log and the same weights, but for the order of sums."""
    found, expected = (
        [line for line in history(folder) if "loss" in line] for folder in (out, alone)
    )
    assert len(found) == len(expected) == 7
    for one, other in zip(found, expected, strict=True):
        for key in KEYS:
            assert one[key] == pytest.approx(other[key], rel=2e-4), (one["step"], key)
    for phase in ("0-warm", "1-sparse"):
        assert damage(out / phase / "model") is None
        assert not list((out / phase).glob("checkpoint-*"))
        models = [AutoModelForCausalLM.from_pretrained(f / phase / "model") for f in (out, alone)]
        for (name, one), (_, other) in zip(*(m.named_parameters() for m in models), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-5, msg=name)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("size", "shard", "context"),
    [(2, True, 1), slow(2, False, 1), slow(2, False, 2), slow(4, True, 2), slow(4, False, 1)],
)
def test_several_processes_train_the_model_of_one(size, shard, context, source, alone, tmp_path):
    process = launch(size, source, tmp_path / "out", shard=shard, context=context)
    told = finished(process)
    assert told.count("done") == size
    assert_as_alone(tmp_path / "out", alone)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("moment", ["checkpoint-2", f"checkpoint-2/{SEAL}"])
def test_a_killed_process_ends_the_run_and_it_goes_on(moment, shard, source, alone, tmp_path):
    out = tmp_path / "out"
    process = launch(2, source, out, shard=shard, more=LINGERING)
    until = time.monotonic() + 240
    while not (out / "1-sparse" / moment).exists() and time.monotonic() < until:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(worker(process.pid, rank=1), signal.SIGKILL)
    killed = time.monotonic()
    told, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "done" not in told
    assert time.monotonic() - killed < 60
    assert damage(out / "0-warm" / "model") is None and not (out / "1-sparse" / "model").exists()
    sealed = moment.endswith(SEAL)
    if sealed:
        with pytest.raises(ValueError, match=rf"with shard={shard}; go on with shard={shard}"):
            run(recipe(source), out, processes=Processes(shard=not shard))
    told = finished(launch(2 if shard else 1, source, out, shard=shard))  # or any other number
    assert f"1-sparse begins at {2 if sealed else 0}" in told and "0-warm" not in told
    assert_as_alone(out, alone)


def worker(launcher: int, rank: int) -> int:
    """The process of that rank which torchrun started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no child of {launcher} has rank {rank}")


def test_a_step_is_shared_evenly_or_not_at_all():
    phase = Phase("p", batch_size=6, accumulate=2)
    assert Processes().share_of(phase) == (6, 2)
    assert Processes(0, 2).share_of(phase) == (6, 1)
    assert Processes(0, 3).share_of(phase) == (4, 1)
    assert Processes(0, 8, context=2).share_of(phase) == (3, 1)
    assert Processes(0, 2).share_of(replace(phase, batch_size=4, accumulate=3)) == (3, 2)
    with pytest.raises(ValueError, match=r"the 12 sequences of a step .* by 5 readers; use a mult"):
        Processes(0, 5).share_of(phase)
