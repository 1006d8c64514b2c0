"""OpenMSA: MiniMax Sparse Attention for every machine. Importing it needs torch alone."""

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
