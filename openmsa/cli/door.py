"""Where a verb meets its user: arguments in, exit code out, one clear line when it fails."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UsageError(ValueError):
    """The command was asked in a way that cannot be done: exit code 2, nothing was started."""


@contextmanager
def usage_checked() -> Iterator[None]:
    """What is refused inside was the user's choice: a ValueError becomes a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Parse for `openmsa.cli.<verb>`, run it, and turn what went wrong into an exit code.

    A verb's module has DESCRIPTION, EXAMPLE, add_arguments(parser) and run(arguments).
    """
    module = importlib.import_module(f"openmsa.cli.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"openmsa {verb}",
        description=textwrap.fill(module.DESCRIPTION, 90),
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    try:
        return int(module.run(parsed) or 0)
    except KeyboardInterrupt:
        return _refuse(verb, "stopped; work already saved is kept", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe has left; there is nobody to tell
        return 1
    except Exception as error:
        if parsed.debug:
            traceback.print_exc()
        message, code = explain(error)
        if message is None:
            raise
        return _refuse(verb, message, code)


def explain(error: Exception) -> tuple[str | None, int]:
    """(message, exit code) of an error that a user can mend; message None: only we can."""
    import torch

    if isinstance(error, UsageError):
        return str(error), 2
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("openmsa"):
        return f"needs the package {error.name}: pip install 'openmsa[all]'", 1
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory: smaller batch or context, or --device cpu", 1
    if isinstance(error, MemoryError):
        return "out of memory: smaller batch or context", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror, 1
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__, 1
    return None, 1


def wrong_verb(verb: str, verbs: Iterable[str]) -> int:
    """Say that there is no such verb and name the nearest one."""
    near = difflib.get_close_matches(verb, list(verbs), n=1)
    hint = f"did you mean `openmsa {near[0]}`?" if near else "`openmsa --help` lists them"
    print(f"openmsa: there is no verb {verb!r}; {hint}", file=sys.stderr)
    return 2


def _refuse(verb: str, message: str, code: int) -> int:
    print(f"openmsa {verb}: {message}", file=sys.stderr)
    return code


class _Help(argparse.RawDescriptionHelpFormatter):
    """The example keeps its line breaks; a default is shown where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        if silent or action.default == argparse.SUPPRESS or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"
