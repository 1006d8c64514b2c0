"""OpenMSA: MiniMax Sparse Attention for every machine. Importing it needs torch alone.

The names below are loaded when first asked for, so that `openmsa --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmsa.mechanisms.msa import MSAConfig, MSAOutput, msa_attention
    from openmsa.ops.block_selection import select_blocks
    from openmsa.ops.dense_attention import dense_attention
    from openmsa.ops.index_loss import index_loss
    from openmsa.ops.sparse_attention import sparse_attention
    from openmsa.selection import Selection

__all__ = [
    "MSAConfig",
    "MSAOutput",
    "Selection",
    "dense_attention",
    "index_loss",
    "msa_attention",
    "select_blocks",
    "sparse_attention",
]

_HOMES = {
    "MSAConfig": "openmsa.mechanisms.msa",
    "MSAOutput": "openmsa.mechanisms.msa",
    "msa_attention": "openmsa.mechanisms.msa",
    "select_blocks": "openmsa.ops.block_selection",
    "dense_attention": "openmsa.ops.dense_attention",
    "index_loss": "openmsa.ops.index_loss",
    "sparse_attention": "openmsa.ops.sparse_attention",
    "Selection": "openmsa.selection",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'openmsa' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
