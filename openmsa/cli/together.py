"""Under `torchrun` a verb runs in several processes, and the first of them speaks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from os import devnull
from pathlib import Path
from typing import TYPE_CHECKING

from openmsa.cli.arguments import whole_number
from openmsa.cli.door import UsageError, usage_checked

if TYPE_CHECKING:
    from openmsa.training.parallel import Processes


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """How several processes share the work: --shard and --context-parallel."""
    group = parser.add_argument_group(
        "several devices", "torchrun --nproc-per-node 8 -m openmsa ... or accelerate launch"
    )
    group.add_argument(
        "--shard", action="store_true", help="weights are shared by all (FSDP2); left out: DDP"
    )
    group.add_argument(
        "--context-parallel",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="N processes share every sequence",
    )


def meet(arguments: argparse.Namespace) -> Processes:
    """This process among those that were started with it.

    Raises UsageError for options that do not fit their number.
    """
    from openmsa.training.parallel import join

    with usage_checked():
        return join(shard=arguments.shard, context=arguments.context_parallel)


def first_speaks(processes: Processes, work: Callable[[], None]) -> int:
    """Do the work in every process and return the exit code; only the first of them prints.

    What the user asked wrongly, the first process tells; any other fault is told by the process
    that meets it. Raises OSError where another process is gone.
    """
    with ExitStack() as stack:
        if not processes.first:
            nothing = stack.enter_context(Path(devnull).open("w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        try:
            work()
        except UsageError:
            if processes.first:
                raise
            return 2
        except (ValueError, OSError) as error:
            if processes.first:
                raise
            raise ValueError(f"process {processes.rank} of {processes.size}: {error}") from error
        except RuntimeError as error:
            if processes.size == 1 or not _is_lost(error):
                raise
            raise OSError(
                f"process {processes.rank} of {processes.size} lost another one; run again with "
                "the same --out: it goes on from the last checkpoint"
            ) from error
    processes.part()
    return 0


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed, as it does when a process is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)
