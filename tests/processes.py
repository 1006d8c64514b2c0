"""Bodies of tests that run in several processes at once, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing


def together(size: int, folder: Path, body: Callable, *arguments) -> None:
    """Run body(rank, *arguments) in `size` gloo processes; what fails in one fails here.

    body: a function at the top level of a module. folder: an empty one.
    """
    multiprocessing.spawn(_run, (size, str(folder / "meeting"), body, arguments), nprocs=size)


def _run(rank: int, size: int, meeting: str, body: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    body(rank, *arguments)
    dist.destroy_process_group()
