"""flash-msa: the eager models that it holds its kernels against, which run anywhere.

The package itself imports kernels for CUDA 13 when it is imported, so that the two files of models
are read alone.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from openmsa.conformance.adapter import TorchAdapter
from openmsa.conformance.adapters import package_version
from openmsa.conformance.adapters.hidden import plain_layout, require
from openmsa.conformance.case import Inputs

KERNELS = ("flash_msa_func", "flash_msa_warmup_func")


class FlashMsa(TorchAdapter):
    """Attention, loss and gradients; it chooses its blocks and keeps them to itself."""

    name = "flash-msa"

    def __init__(self):
        self.sparse = _model("testing_model", "Model")
        self.warmup = _model("testing_model_warmup", "WarmupModel")

    def version(self) -> str:
        return f"flash-msa {package_version('flash-msa')} (eager model)"

    def attend(self, x: Inputs) -> tuple[Tensor, None]:
        return self._run(x)[0], None

    def loss(self, x: Inputs) -> Tensor:
        require(x.row_weights is None, "weights of rows")
        return self._run(x)[1]

    def _run(self, x: Inputs) -> tuple[Tensor, Tensor]:
        plain_layout(x)
        rule, (s, size) = x.rule, (x.k.shape[1], x.rule.block_size)
        require(not x.imposed, "attention to blocks that are given")
        require(x.q.shape[1] == s, "fewer queries than keys")
        require(s % size == 0, "a last block that is short")
        require(rule.local_blocks == 1 and rule.sink_blocks == 0, "forced blocks but the own one")
        require(rule.top_k <= s // size or rule.phase == "warmup", "top_k above the blocks there")
        require(rule.scale is None and rule.index_scale is None, "scales other than 1 / sqrt(d)")
        require(x.q_index.shape[-1] == x.q.shape[-1], "an index of another width than heads")
        kind = self.warmup if rule.phase == "warmup" else self.sparse
        h, g, d = x.q.shape[2], x.k.shape[2], x.q.shape[3]
        model = kind(h, g, d, g, 1, rule.top_k * size, use_kernel=False)
        model.block_size = size
        ordered = (x.q_index, x.k_index[:, :, None], x.q, x.k, x.v)
        out, loss = model._attention_eager(*(y.transpose(1, 2) for y in ordered))
        return out.unflatten(-1, (h, -1)), loss


def _model(file: str, name: str) -> type[nn.Module]:
    """A class of flash_msa/tests, loaded beside a stand-in for the kernels that it imports.

    Raises ImportError where flash-msa is not installed.
    """
    spec = importlib.util.find_spec("flash_msa")
    if spec is None or spec.origin is None:
        raise ImportError("No module named 'flash_msa'")
    path = Path(spec.origin).parent / "tests" / f"{file}.py"
    stand_in = ModuleType("flash_msa")
    for kernel in KERNELS:
        setattr(stand_in, kernel, None)
    before = sys.modules.get("flash_msa")
    sys.modules["flash_msa"] = stand_in
    try:
        spec = importlib.util.spec_from_file_location(f"flash_msa_{file}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("flash_msa")
        if before is not None:
            sys.modules["flash_msa"] = before
    return getattr(module, name)
