"""A MiniMax-M3 of one sparse layer in transformers' own attention and enabled: a process for each.

Three parts, each through the model's public forward: "forward" (a prompt without gradients),
"training" (loss and backward, ours with the index loss, theirs without for want of one), "decode"
(one token more, with `tokens` of them in the cache).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from openmsa.accounting import inputs, judge, m3, machine
from openmsa.accounting.inputs import Shape
from openmsa.accounting.timing import Times, timed

PARTS = ("forward", "training", "decode")
SIDES = ("sdpa", "eager", "openmsa")
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Found:
    """One side of one part: seconds, the most memory above the model and its inputs, and what came
    out of it (hidden states or a loss) to be compared.
    """

    times: Times
    peak_bytes: int
    out: torch.Tensor


def measure(
    side: str, part: str, shape: Shape, tokens: int, *, hidden: int, chunk: int, seconds: float
) -> Found:
    """Run one side of one part in a process of its own.

    chunk: tokens per forward of a prompt, 0 for all at once. Raises MemoryError if the process was
    killed, RuntimeError with its last line if it failed.
    """
    job = {
        "side": side,
        "part": part,
        "shape": asdict(shape),
        "tokens": tokens,
        "hidden": hidden,
        "chunk": chunk,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    told = m3.in_a_process(job, __name__)
    return Found(Times(tuple(told["seconds"])), told["peak_bytes"], told["out"])


def bytes_of_theirs(part: str, shape: Shape, tokens: int) -> int:
    """What transformers holds at the most, about: masks and scores, in training once more for each
    of what its backward pass keeps.
    """
    if part == "decode":
        return 16 * tokens * shape.h * (shape.d + shape.d_index)
    whole = shape.g * m3.group_bytes(shape, tokens)
    return whole if part == "forward" else 3 * whole


def bytes_of_ours(part: str, shape: Shape, tokens: int) -> int:
    """What the enabled layer holds at the most, about: norms of queries in fp32, mostly."""
    per_query = {"forward": 18, "training": 36, "decode": 0}[part]
    return tokens * (per_query * shape.h * shape.d + 8 * shape.g * (shape.d + shape.d_index))


def on_groups(shape: Shape, groups: int) -> Shape:
    """The same layer with fewer KV heads and their query heads."""
    return replace(shape, h=groups * shape.r, g=groups)


def same(ours: Found, theirs: Found) -> judge.Verdict:
    """Outputs of both. Blocks that tie in bf16 may differ, so the median token decides."""
    a, b = ours.out.float(), theirs.out.float()
    differences = (a - b).abs().flatten(1).amax(1) / b.abs().max()
    worst, middle = float(differences.max()), float(differences.median())
    words = f"differs from transformers by {middle:.1e} in the median token, {worst:.1e} at most"
    return judge.Verdict(middle < 0.03, words)


def run_side(job: dict) -> None:
    """What a child process does: measure one side and leave a file."""
    torch.set_num_threads(job["threads"])
    shape, tokens = Shape(**job["shape"]), job["tokens"]
    model = _model(job["side"], shape, tokens, job["hidden"])
    prepared = {"forward": _forward, "training": _training, "decode": _decode}[job["part"]]
    once = prepared(model, tokens, job["chunk"])
    machine.forget_peak()
    before = machine.resident_bytes()
    out: list[torch.Tensor] = []

    def repeat() -> None:
        out[:] = [once()]

    times = timed(repeat, seconds=job["seconds"])
    told = {"seconds": times.seconds, "peak_bytes": machine.peak_bytes() - before}
    torch.save({**told, "out": out[0].detach().float()}, job["told"])


def _model(side: str, shape: Shape, tokens: int, hidden: int):
    from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as configuration
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modelling

    from openmsa import hf

    torch.manual_seed(0)
    config = configuration.MiniMaxM3VLTextConfig(
        vocab_size=256,
        hidden_size=hidden,
        dense_intermediate_size=64,  # a narrow MLP: attention is what is measured
        num_hidden_layers=1,
        num_attention_heads=shape.h,
        num_key_value_heads=shape.g,
        head_dim=shape.d,
        index_n_heads=shape.g,
        index_head_dim=shape.d_index,
        index_block_size=shape.block_size,
        index_topk_blocks=shape.top_k,
        max_position_embeddings=2 * tokens + 1024,
        layer_types=["minimax_m3_sparse"],
        mlp_layer_types=["dense"],
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = "sdpa" if side == "openmsa" else side
    model = modelling.MiniMaxM3VLForCausalLM._from_config(config, attn_implementation=theirs)
    model = model.to(BF16).eval()
    return hf.enable(model) if side == "openmsa" else model


def _prompt(tokens: int) -> torch.Tensor:
    return torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))


def _forward(model, tokens: int, chunk: int) -> Callable[[], torch.Tensor]:
    """All at once without a cache, or in chunks with one; the last token's logits come back, and
    the hidden states of a few.
    """
    from transformers import DynamicCache

    ids, rows = _prompt(tokens), judge.sampled(chunk or tokens)

    @torch.no_grad()
    def once() -> torch.Tensor:
        if not chunk:
            return model.model(ids, use_cache=False).last_hidden_state[0, rows]
        cache = DynamicCache(config=model.config)
        for part in ids.split(chunk, 1):
            out = model.model(part, use_cache=True, **{_cache_name(model): cache})
        return out.last_hidden_state[0, judge.sampled(part.shape[1])]

    return once


def _training(model, tokens: int, chunk: int) -> Callable[[], torch.Tensor]:
    """Loss and gradients of all weights; the language model's loss comes back."""
    ids = _prompt(tokens)
    model.train()

    def once() -> torch.Tensor:
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        return out.get("lm_loss", out.loss).detach()[None, None]

    return once


def _decode(model, tokens: int, chunk: int) -> Callable[[], torch.Tensor]:
    """A token more each time, in front of keys that were drawn, not computed."""
    from transformers import DynamicCache

    config, cache = model.config, DynamicCache(config=model.config)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    keys, values = (inputs.normal(*shape, dtype=BF16, seed=seed) for seed in (2, 3))
    cache.update(keys, values, 0)
    cache.layers[0].update_index(
        inputs.normal(1, 1, tokens, config.index_head_dim, dtype=BF16, seed=4)
    )
    ids = _prompt(1)

    @torch.no_grad()
    def once() -> torch.Tensor:
        out = model(ids, use_cache=True, **{_cache_name(model): cache})
        return out.logits[0]

    first = once()  # ours moves the cache into its own rows here, once
    return lambda: (once(), first)[1]


def _cache_name(model) -> str:
    import inspect

    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


if __name__ == "__main__":
    run_side(json.loads(sys.argv[1]))
