"""Several processes run one verb: one of them speaks, and wrong numbers of them are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openmsa.cli import main
from openmsa.cli.door import UsageError
from openmsa.cli.together import first_speaks
from openmsa.training.parallel import Processes

ROOT = Path(__file__).parents[2]
SMALL = [
    f"--set=phases.{phase}.{key}={value}"
    for phase in ("warm", "sparse")
    for key, value in (("steps", 2), ("seq_len", 96), ("batch_size", 1))
]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shard"], "shard=True needs several processes; start the program by `torchrun"),
        (["--context-parallel", "2"], "context=2 must divide the number of processes, which is 1"),
    ],
)
def test_one_process_cannot_share(options, told, tmp_path, capsys):
    assert main(["train", "--recipe", "msa-cpt", "--out", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_the_first_tells_what_was_asked_wrongly(capsys):
    def wrong():
        print("loading")
        raise UsageError("there is no such thing")

    def broken():
        raise ValueError("it broke")

    with pytest.raises(UsageError):
        first_speaks(Processes(0, 1), wrong)
    assert capsys.readouterr().out == "loading\n"
    assert first_speaks(Processes(1, 2), wrong) == 2
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="^process 1 of 2: it broke"):
        first_speaks(Processes(1, 2), broken)


def test_a_lost_process_is_told_as_such():
    def lose():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    with pytest.raises(OSError, match="process 1 of 2 lost another one; run again with the same"):
        first_speaks(Processes(1, 2), lose)
    with pytest.raises(RuntimeError, match="closed by peer"):
        first_speaks(Processes(0, 1), lose)


@pytest.mark.slow
def test_two_processes_train_and_one_of_them_prints(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def f_{i}(x): return x + {i}" for i in range(400)))
    out = tmp_path / "out"
    train = ["train", "--recipe", "msa-cpt", "--data", str(text), "--out", str(out), *SMALL]
    train += ["--context-parallel", "2", "--block-size", "8", "--top-k", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", "openmsa", *train],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Trained by msa-cpt") == run.stdout.count("Converted") == 1
    assert run.stderr.count("phase warm: 2 steps") == 1
    assert (out / "1-sparse" / "model" / "model.safetensors").exists()
