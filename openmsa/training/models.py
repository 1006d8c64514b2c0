"""The small dense model that ships with OpenMSA, before training."""

from __future__ import annotations

from openmsa.training.byte_tokenizer import END_OF_TEXT, PAD, VOCAB_SIZE


def byte_model(*, seed: int = 0, max_position_embeddings: int = 32768):
    """A Qwen3 with random weights: 4 layers, 256 wide, 8 query / 2 KV heads of 32, bytes as tokens.

    Returns a `transformers.Qwen3ForCausalLM` of 3.1M parameters in fp32.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
