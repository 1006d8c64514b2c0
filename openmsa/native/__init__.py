"""The C++ kernels of the cpu backend, which know nothing of torch.

Tensors arrive as views: (address, four sizes, four strides in elements, kind), with kind one of
KINDS. Blocks arrive as (address, sizes, strides) or None, packed borders as (address of queries',
address of keys', number of sequences) or None, single arrays as an address, 0 for none. The caller
keeps all of it alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("float32", "float16", "bfloat16")
# Every set of kernels there can be, best first.
EVERY_INSTRUCTION_SET = ("avx512bf16", "avx512", "avx2", "portable")

try:
    from openmsa.native import _kernels
except ImportError as error:
    _kernels = None
    _WHY = f"the native kernels could not be loaded: {error}"
else:
    _WHY = None

if _kernels is None:
    try:
        from openmsa.native._build import WHY_NOT
    except ImportError:
        _WHY = "the native kernels are not built: OpenMSA runs from its folder, not installed"
    else:
        _WHY = f"the native kernels are not built: {WHY_NOT}" if WHY_NOT else _WHY

_chosen = 0  # place in instruction_sets() of the one that runs


def unavailable() -> str | None:
    """None if the kernels can run here; otherwise why not."""
    return _WHY


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that were built and that this processor has, best first."""
    return () if _kernels is None else _kernels.instruction_sets()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run another set of kernels than the best, for tests and comparisons, in every thread.

    Raises ValueError for one that cannot run here.
    """
    global _chosen
    usable = instruction_sets()
    if name not in usable:
        raise ValueError(
            f"instruction set {name!r} cannot run here; usable: {', '.join(usable) or 'none'}"
        )
    before, _chosen = _chosen, usable.index(name)
    try:
        yield
    finally:
        _chosen = before


def chosen_instruction_set() -> str | None:
    """The instruction set whose kernels run now; None without kernels."""
    return instruction_sets()[_chosen] if _kernels else None


def select_blocks(threads: int, *arguments) -> None:
    """(q_index, k_index, address of blocks, block_size, top_k, local_blocks, sink_blocks,
    index_scale, borders)"""
    _kernels.select_blocks(_chosen, threads, *arguments)


def attend(threads: int, *arguments) -> None:
    """(q, k, v, blocks, block_size, scale, out, address of lse, borders)"""
    _kernels.attend(_chosen, threads, *arguments)


def attend_backward(threads: int, *arguments) -> None:
    """(q, k, v, blocks, block_size, scale, out, dout, address of lse, dq, dk, dv, borders)"""
    _kernels.attend_backward(_chosen, threads, *arguments)


def index_loss(threads: int, *arguments) -> tuple[float, float]:
    """(q, k, q_index, k_index, blocks, block_size, scale, index_scale, then addresses of weights,
    lse, dq and dk, borders) -> the sums of w * KL and of w, over tokens and groups"""
    return _kernels.index_loss(_chosen, threads, *arguments)
