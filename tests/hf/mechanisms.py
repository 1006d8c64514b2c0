"""Every mechanism with numbers far below contexts of 40 tokens and more, and its direct call."""

from __future__ import annotations

import torch

from openmsa import hf
from openmsa.mechanisms import dsa, infllm2, moba, msa, nsa, window
from tests.hf.tiny import tiny_model, tiny_tokens

SMALL = {
    "msa": msa.MSAConfig(block_size=4, top_k=3),
    "nsa": nsa.NSAConfig(kernel=4, stride=2, block_size=4, top_k=4, window=6),
    "moba": moba.MoBAConfig(block_size=4, top_k=3),
    "infllm2": infllm2.InfLLM2Config(
        kernel=4, stride=2, block_size=4, top_k=4, local_blocks=1, dense_below=0
    ),
    "dsa": dsa.DSAConfig(top_k=7, index_heads=4, d_index=16),
    "window": window.WindowConfig(window=7, sinks=2),
    "window and blocks": window.WindowConfig(
        window=7, sinks=2, global_blocks=1, random_blocks=2, block_size=4
    ),
}
# Numbers at which nothing is left out; NSA has none: its compressed branch never closes.
EVERYTHING = {
    "msa": msa.MSAConfig(block_size=4, top_k=64),
    "moba": moba.MoBAConfig(block_size=4, top_k=64),
    "infllm2": infllm2.InfLLM2Config(dense_below=1000),
    "dsa": dsa.DSAConfig(top_k=256, index_heads=2, d_index=8),
    "window": window.WindowConfig(window=256),
    "window and blocks": window.WindowConfig(window=7, random_blocks=64, block_size=4),
}
WITH_INDEX = ("msa", "dsa")
LENGTHS = (37, 50, 1, 23)


def with_layers(config, layers):
    """The same numbers for some layers only."""
    return type(config)(**{**vars(config), "layers": layers})


def direct(call, attention, config, **how):
    """What the mechanism's one call makes of a captured call, by the reference: an Output."""
    main = (call.q, call.k, call.v)
    borders = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
    how = {"scale": call.scale, "backend": "reference", **borders, **how}
    if isinstance(config, msa.MSAConfig):
        numbers = {"block_size": config.block_size, "top_k": config.top_k}
        return msa.msa_attention(*main, call.q_index, call.k_index, **numbers, **how)
    if isinstance(config, dsa.DSAConfig):
        index = (call.q_index, call.k_index, call.others["head_weights"])
        return dsa.dsa_attention(*main, *index, config, **how)
    if isinstance(config, nsa.NSAConfig):
        weights = (attention.compress_k_weight, attention.compress_v_weight)
        compressed = [
            nsa.compress(x, weight, config, cu_seqlens_k=call.cu_seqlens_k)
            for x, weight in zip(main[1:], weights, strict=True)
        ]
        return nsa.nsa_attention(*main, *compressed, call.others["gates"], config, **how)
    plain = {
        moba.MoBAConfig: moba.moba_attention,
        infllm2.InfLLM2Config: infllm2.infllm2_attention,
        window.WindowConfig: window.windowed_attention,
    }
    return plain[type(config)](*main, config, **how)


def converted(name: str, family: str = "qwen3", config=None):
    return disturbed(hf.convert(tiny_model(family), config or SMALL[name]))


def disturbed(model):
    """The same model with its additions far from where they start."""
    torch.manual_seed(3)
    for _, parameter in hf.added_parameters(model):
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def sequences() -> list[torch.Tensor]:
    return [tiny_tokens(n, seed=i) for i, n in enumerate(LENGTHS)]
