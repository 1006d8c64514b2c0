"""A GPU's own clock, its roofs and its memory; where Triton is interpreted, those of the CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.accounting import machine, timing
from openmsa.accounting.timing import Times
from openmsa.ops import gpu

# More than the last cache of any chip: what is written between repeats leaves nothing there.
CACHES_BYTES = 256 << 20


@dataclass(frozen=True)
class Roofs:
    """What torch gets out of the chip, a second: a product of matrices, a copy's bytes (read and
    written)."""

    flops: float
    bytes: float

    def least_seconds(self, flops: float, num_bytes: float) -> float:
        """The longer of what the arithmetic and the traffic take at these rates."""
        return max(flops / self.flops, num_bytes / self.bytes)


def device() -> torch.device:
    """Where the triton backend takes its tensors."""
    return torch.device("cpu" if gpu.interpreted() else "cuda")


def timed(run: Callable[[], object], *, seconds: float, most: int = 30) -> Times:
    """Repeat `run` until `seconds` are over, at least once; a first pass, which compiles, is extra.

    Time is that between two events in the GPU's queue. Before each repeat the caches are filled
    with something else, as the rest of a model would, and the host may run one repeat ahead, so
    that its launches hide behind the GPU's work where there is enough of it.
    """
    if device().type == "cpu":
        return timing.timed(run, seconds=seconds, most=3)
    run()
    other = torch.empty(CACHES_BYTES, dtype=torch.int8, device=device())
    began, events = time.perf_counter(), []
    while not events or (len(events) < most and time.perf_counter() - began < seconds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        other.zero_()
        start.record()
        run()
        end.record()
        events.append((start, end))
        if len(events) > 1:
            events[-2][1].synchronize()
    events[-1][1].synchronize()
    return Times(tuple(start.elapsed_time(end) / 1e3 for start, end in events))


def graphed(run: Callable[[], Tensor]) -> Callable[[], None]:
    """`run` as a CUDA graph: a call replays it without the host's part in each launch.

    Raises RuntimeError where `run` waits for the device or allocates what a graph cannot hold.
    """
    if device().type == "cpu":
        raise RuntimeError("a graph needs a GPU; this is the interpreter")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept=kept) -> None:
        graph.replay()

    return replay


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Memory that one call needs at most above what was there, its results included."""
    if device().type == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_bytes() -> int:
    """Memory that could still be taken, torch's own reserve included."""
    gc.collect()
    if device().type == "cpu":
        return machine.available_bytes() or 8 << 30
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def lost() -> bool:
    """Whether an illegal access has spoilt the GPU for this process: every later call fails too."""
    if device().type == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def roofs(dtype: torch.dtype, size: int, num_bytes: int, *, seconds: float = 0.1) -> Roofs:
    """Measured now: the product of two square matrices, and copying `num_bytes`."""
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in "ab")
    c = torch.empty_like(a)
    product = timed(lambda: torch.mm(a, b, out=c), seconds=seconds)
    source = torch.zeros(num_bytes, dtype=torch.int8, device=device())
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), seconds=seconds)
    return Roofs(2 * size**3 / product.median, 2 * num_bytes / copy.median)
