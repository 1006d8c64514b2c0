"""NVIDIA NeMo AutoModel: the attention layer of its MiniMax-M3 (sparse_attn="generic")."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.minimax_m3_vl import layers
from torch import Tensor, nn

from openmsa.conformance.adapter import TorchAdapter
from openmsa.conformance.adapters import package_version
from openmsa.conformance.adapters.hidden import Channels, plain_layout, plain_shape, require
from openmsa.conformance.case import Inputs


class NemoAutomodel(TorchAdapter):
    """Selection and attention with gradients; a trainer, without a cache, a loss or an LSE."""

    name = "nemo-automodel"

    def version(self) -> str:
        return f"nemo-automodel {package_version('nemo-automodel')}"

    def select(self, x: Inputs) -> Tensor:
        plain_layout(x)
        t, s = x.q.shape[1], x.k.shape[1]
        kept = layers.select_sparse_blocks(
            x.q_index,
            x.k_index[:, :, None],
            block_size=x.rule.block_size,
            topk_blocks=x.rule.top_k,
            init_blocks=x.rule.sink_blocks,
            local_blocks=x.rule.local_blocks,
            q_positions=torch.arange(s - t, s, device=x.q.device),
        )
        number = torch.arange(kept.shape[-1], device=kept.device)
        return torch.where(kept, number, -1)

    def attend(self, x: Inputs) -> tuple[Tensor, None]:
        plain_shape(x)
        require(x.q.shape[1] == x.k.shape[1], "fewer queries than keys, outside its own sharding")
        require(not x.imposed, "attention to blocks that are given")
        channels, sparse = Channels(x), x.rule.phase == "sparse"
        layer = _layer(x, channels.width, sparse)
        for name in ("q", "k", "v"):
            setattr(layer, f"{name}_proj", channels.take(name))
        if sparse:
            layer.indexer.index_q_proj = channels.take("q_index")
            layer.indexer.index_k_proj = channels.take("k_index")
            layer.indexer.index_q_norm = layer.indexer.index_k_norm = nn.Identity()
        layer.q_norm = layer.k_norm = layer.o_proj = nn.Identity()
        hidden = channels.hidden(x)
        unrotated = torch.tensor([1.0, 0.0], device=hidden.device).expand(*hidden.shape[:2], 2)
        out = layer(hidden, freqs_cis=unrotated, attention_mask=_mask(x))
        return out.unflatten(-1, x.q.shape[2:]), None


def _mask(x: Inputs) -> Tensor | None:
    """Padding by token; packed sequences as a mask of blocks along the diagonal, as its data has
    them."""
    if not x.packed:
        return x.mask
    require(torch.equal(x.cu_seqlens_q, x.cu_seqlens_k), "packed sequences of two lengths")
    document = torch.arange(len(x.cu_seqlens_q) - 1).repeat_interleave(x.cu_seqlens_q.diff().cpu())
    return (document[:, None] == document)[None, None].to(x.q.device)


def _layer(x: Inputs, width: int, sparse: bool) -> nn.Module:
    config = SimpleNamespace(
        hidden_size=width,
        num_attention_heads=x.q.shape[2],
        num_key_value_heads=x.k.shape[2],
        head_dim=x.q.shape[3],
        rms_norm_eps=1e-6,
        use_qk_norm=True,
        use_gemma_norm=True,
        sparse_attention_config={
            "sparse_num_index_heads": x.q_index.shape[2],
            "sparse_index_dim": x.q_index.shape[3],
            "sparse_block_size": x.rule.block_size,
            "sparse_topk_blocks": x.rule.top_k,
            "sparse_init_block": x.rule.sink_blocks,
            "sparse_local_block": x.rule.local_blocks,
        },
    )
    backend = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", rope_fusion=False)
    with torch.device("meta"):
        return layers.MiniMaxM3Attention(config, backend, is_sparse_attention_layer=sparse)
