"""Tiny random MiniMax-M3 models: a dense layer, then sparse ones, contexts beyond the budget."""

from __future__ import annotations

import pytest
import torch

from tests.hf.tiny import VOCABULARY

modelling = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
configuration = pytest.importorskip("transformers.models.minimax_m3_vl.configuration_minimax_m3_vl")

IMAGE = 60  # the last token of the vocabulary stands for a part of an image
FULL, SPARSE = "full_attention", "minimax_m3_sparse"
ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_block_size": 4,
    "index_topk_blocks": 3,
    "index_local_blocks": 1,
}
LEGACY = {
    "sparse_num_index_heads": 2,
    "sparse_index_dim": 8,
    "sparse_block_size": 4,
    "sparse_topk_blocks": 3,
    "sparse_local_block": 1,
    "sparse_attention_freq": [0, 1, 1],
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 16,
    "dense_intermediate_size": 32,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}


def m3_config(**fields):
    """A text configuration with two sparse layers of three."""
    settings = {**TEXT, **ATTENTION, "layer_types": [FULL, SPARSE, SPARSE], **fields}
    return configuration.MiniMaxM3VLTextConfig(**settings)


def tiny_m3(*, seed: int = 0, attention: str = "eager", **fields):
    """A text model in evaluation mode whose attention is far from uniform."""
    return _started(modelling.MiniMaxM3VLForCausalLM, m3_config(**fields), seed, attention)


def tiny_m3_vision(*, seed: int = 0, attention: str = "eager", **fields):
    """The vision-language model around such a text model."""
    config = configuration.MiniMaxM3VLConfig(
        text_config=m3_config(**fields).to_dict(),
        vision_config=VISION,
        image_token_index=IMAGE,
        video_token_index=IMAGE - 1,
        projector_hidden_size=32,
    )
    kind = modelling.MiniMaxM3SparseForConditionalGeneration
    return _started(kind, config, seed, attention)


def _started(kind: type, config, seed: int, attention: str):
    torch.manual_seed(seed)
    experts = {"experts_implementation": "eager"}  # the others take no fp64
    model = kind._from_config(config, attn_implementation=attention, **experts)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # left at 0, where they multiply by 1, they would hide mistakes
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def picture(seed: int = 0) -> dict[str, torch.Tensor]:
    """Patches of one image that stands for four tokens."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
