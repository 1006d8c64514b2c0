"""Peak memory and time of the portable backend at 32K tokens, 64 query and 4 KV heads, d 128, bf16.

    python benchmarks/portable_memory.py

One whole layer's sparse phase: select, attend, index loss, forward and backward, in a process of
its own. Memory is the peak of the resident set above what the process held before, less outputs
and gradients.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from record import record

import openmsa


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    t = parser.parse_args().tokens
    h, g, d = 64, 4, 128
    shapes = {"q": (t, h, d), "k": (t, g, d), "v": (t, g, d), "qi": (t, g, d), "ki": (t, d)}
    torch.manual_seed(0)
    x = {
        name: torch.randn(1, *shape, dtype=torch.bfloat16).requires_grad_()
        for name, shape in shapes.items()
    }
    before = status("VmRSS")
    start = time.perf_counter()
    selection = openmsa.select_blocks(x["qi"].detach(), x["ki"].detach())
    selected = time.perf_counter()
    out = openmsa.sparse_attention(x["q"], x["k"], x["v"], selection)
    attended = time.perf_counter()
    out.backward(torch.ones_like(out))
    differentiated = time.perf_counter()
    loss = openmsa.index_loss(x["q"], x["k"], x["qi"], x["ki"], selection)
    loss.backward()
    end = time.perf_counter()
    results = [out, out, selection.blocks, *(tensor.grad for tensor in x.values())]
    above = status("VmHWM") - before - sum(tensor.nbytes for tensor in results)
    shape = f"{t} tokens, {h}/{g} heads, d {d}, block 128, k 16, bf16"
    measured = {
        "peak above inputs, outputs, gradients": ("GB", above / 1e9),
        "select": ("s", selected - start),
        "attend forward": ("s", attended - selected),
        "attend backward": ("s", differentiated - attended),
        "index loss and gradients": ("s", end - differentiated),
    }
    rows = [
        {"what": "portable", "shape": shape, "metric": name, "unit": unit, "p50": f"{value:.2f}"}
        for name, (unit, value) in measured.items()
    ]
    for row in rows:
        print(row["metric"], row["p50"], row["unit"])
    print(record("portable_memory", rows))


if __name__ == "__main__":
    main()
