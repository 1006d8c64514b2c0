"""How the kernels of attention and of the index loss are launched: tile, warps and stages.

One rule per kernel, from widths and the GPU alone. Each rule is compiled ahead of time for every
chip that it serves, without spills; which of several such rules is fastest is for a GPU to say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from openmsa.ops.gpu import Gpu

# Programs of a unit that keep it busy.
PROGRAMS_PER_UNIT = 2


@dataclass(frozen=True)
class Launch:
    rows: int  # query tokens times heads of a tile
    keys: int  # at once, at most
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def _fp32(key: int) -> Launch:
    """Three products for one, in registers: small tiles."""
    if key <= 256:
        return Launch(rows=32, keys=16, num_warps=8, num_stages=1)
    return Launch(rows=16, keys=32 if key <= 512 else 16, num_warps=8, num_stages=1)


def for_tiles(width: int, itemsize: int, gpu: Gpu) -> Launch:
    """A program that owns queries and walks over keys; width: padded channels of both factors."""
    key = width * itemsize
    if itemsize == 4:
        return _fp32(key)
    if key > 512 and gpu.hip:
        return Launch(rows=32, keys=16, num_warps=8, num_stages=1)
    if key > 512:
        return Launch(rows=32, keys=32 if key <= 1024 else 16, num_warps=4, num_stages=2)
    if gpu.hip:
        return Launch(rows=64, keys=32, num_warps=4, num_stages=2)
    if gpu.capability < 90:
        return Launch(rows=64, keys=64, num_warps=8, num_stages=2)
    return Launch(rows=64, keys=64, num_warps=4, num_stages=3)


def for_prefixes(width: int, itemsize: int, gpu: Gpu) -> Launch:
    """As for_tiles, but all rows of a tile read the same keys, so that a larger one wastes none."""
    if width * itemsize > 512 or gpu.hip:
        return for_tiles(width, itemsize, gpu)
    # Below Hopper four warps spill with 64 rows, and eight with 128.
    return Launch(rows=128 if gpu.capability >= 90 else 64, keys=64, num_warps=8, num_stages=2)


def for_losses(width: int, itemsize: int, gpu: Gpu) -> Launch:
    """As for_tiles, for the index loss; four warps would spill on Blackwell."""
    made = for_tiles(width, itemsize, gpu)
    return replace(made, num_warps=8) if gpu.capability >= 100 else made


def for_owners(width: int, itemsize: int, gpu: Gpu) -> Launch:
    """A program that owns keys and walks over the queries that read them."""
    key = width * itemsize
    if itemsize == 4:
        return _fp32(key)
    if key > 512:
        rows = 16 if gpu.hip else 32
        return Launch(rows=rows, keys=32 if key <= 1024 else 16, num_warps=8, num_stages=1)
    if gpu.hip:
        return Launch(rows=32, keys=32, num_warps=4, num_stages=2)
    spills = gpu.capability < 90 and key <= 256
    return Launch(rows=32 if spills else 64, keys=64, num_warps=8, num_stages=2)


def splits_for(programs: int, steps: int, gpu: Gpu) -> int:
    """Into how many parts a tile's reading is cut so that every unit has work."""
    return max(1, min(PROGRAMS_PER_UNIT * gpu.units // max(1, programs), steps))
