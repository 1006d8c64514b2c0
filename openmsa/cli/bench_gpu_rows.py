"""Rows of `openmsa bench gpu` as gpu.csv tells them: those of bench cpu, then what a GPU adds."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from openmsa.cli import bench_rows
from openmsa.cli.bench_gpu_plan import GpuRow, GpuRun
from openmsa.cli.bench_rows import BENCH_COLUMNS

# floor_ms: the longer of FLOPs and bytes at the roofs beside it; of_floor: that over the median.
GPU_COLUMNS = (
    *BENCH_COLUMNS,
    "part",
    "status",
    "batch",
    "floor_ms",
    "of_floor",
    "peak_gb",
    "matmul_tflops",
    "copy_gb_s",
    "triton",
    "cuda",
)


def as_csv(row: GpuRow, run: GpuRun, stamp: str) -> dict[str, object]:
    """One row; numbers that were not measured are empty."""
    told = bench_rows.as_csv(row, run, stamp)
    timed = row.ours[1] == row.ours[1]
    if not timed:
        told.update(p20="", p50="", p80="")
    floor, roofs = row.floor_ms, row.roofs
    return {
        **told,
        **_software(),
        "part": row.part,
        "status": row.status,
        "batch": row.batch,
        "floor_ms": "" if floor is None else f"{floor:.6g}",
        "of_floor": f"{floor / row.ours[1]:.4g}" if timed and floor else "",
        "peak_gb": "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.4g}",
        "matmul_tflops": "" if roofs is None else f"{roofs.flops / 1e12:.4g}",
        "copy_gb_s": "" if roofs is None else f"{roofs.bytes / 1e9:.4g}",
    }


@cache
def _software() -> dict[str, str]:
    import torch

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "built in"
    return {"triton": triton, "cuda": torch.version.cuda or torch.version.hip or "none"}
