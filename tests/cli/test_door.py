"""At the door: help, wrong verbs, exit codes, and no traceback for a user's mistake."""

from __future__ import annotations

import argparse
import errno
import importlib
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch

from openmsa.cli import VERBS, main
from openmsa.cli.door import UsageError, usage_checked


@pytest.fixture
def verb(monkeypatch):
    """A verb that does what the test says: `verb(error)` makes `openmsa probe` raise it."""

    def make(error):
        def run(arguments):
            if isinstance(error, BaseException):
                raise error
            return error

        module = SimpleNamespace(
            DESCRIPTION="", EXAMPLE="", add_arguments=lambda parser: None, run=run
        )
        monkeypatch.setitem(sys.modules, "openmsa.cli.probe", module)
        monkeypatch.setitem(VERBS, "probe", "does what the test says")

    return make


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_verb(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in VERBS)


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main(["convrt"]) == 2
    assert "`openmsa convert`" in capsys.readouterr().err


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_helps_with_an_example_that_parses(name, capsys):
    assert main([name, "--help"]) == 0
    module = importlib.import_module(f"openmsa.cli.{name}")
    program, named, *rest = shlex.split(module.EXAMPLE)
    assert (program, named) == ("openmsa", name)
    assert module.EXAMPLE in capsys.readouterr().out
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    parser.parse_args(rest)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_refuses_an_unknown_flag_with_2(name, capsys):
    assert main([name, "--no-such-flag"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (UsageError("say it otherwise"), 2, "openmsa probe: say it otherwise"),
        (ValueError("top_k=0 is no number of blocks"), 1, "top_k=0 is no number of blocks"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 1, "No such file: a.txt"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (ModuleNotFoundError("no", name="datasets"), 1, "needs the package datasets"),
        (torch.OutOfMemoryError("CUDA"), 1, "out of GPU memory"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_goes_wrong_has_a_code_and_one_line(verb, capsys, error, code, message):
    verb(error)
    assert main(["probe"]) == code
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert told.count("\n") == (1 if message else 0)


def test_debug_shows_where_it_went_wrong(verb, capsys):
    verb(ValueError("no"))
    assert main(["probe", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), ModuleNotFoundError("x", name="openmsa.x")])
def test_our_own_mistakes_are_not_hidden(verb, error):
    verb(error)
    with pytest.raises(type(error)):
        main(["probe"])


def test_a_value_refused_by_a_door_is_wrong_usage():
    with pytest.raises(UsageError, match="block_size"), usage_checked():
        raise ValueError("block_size must be at least 1")


def test_a_broken_pipe_is_no_news(tmp_path):
    import subprocess

    command = f"{sys.executable} -m openmsa env | head -1"
    told = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert told.stdout.startswith("Machine") and "Traceback" not in told.stderr
