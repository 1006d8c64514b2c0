"""MSA from scratch against its dense twin: same recipe, tokens and seed; held-out perplexity.

    python benchmarks/from_scratch.py --out runs/from_scratch

Resumes where it was left. Writes two rows per bucket of positions and one for the whole text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from record import record

from openmsa import MSAConfig, hf
from openmsa.cli.texts import sequences
from openmsa.evaluation.perplexity import compare, position_loss
from openmsa.training import history, standard_library_text, train
from openmsa.training.byte_tokenizer import byte_tokenizer
from openmsa.training.models import byte_model
from openmsa.training.recipes import dense_twin, msa_pt
from openmsa.training.trainer import fast_bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/from_scratch"))
    parser.add_argument("--warm-steps", type=int, default=60)
    parser.add_argument("--sparse-steps", type=int, default=200)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--texts", type=int, default=200)
    options = parser.parse_args()
    config = MSAConfig(block_size=options.block_size, top_k=options.top_k)
    recipe = msa_pt(options.warm_steps, options.sparse_steps)
    tokenizer = byte_tokenizer()
    starts = {
        "msa": (recipe, lambda: hf.convert(byte_model(), config, init="random")),
        "dense": (dense_twin(recipe), byte_model),
    }
    length = recipe.phases[-1].seq_len
    texts = sequences(
        standard_library_text("heldout"), tokenizer, num_tokens=length, num_sequences=options.texts
    )
    losses = {}
    for name, (what, start) in starts.items():
        model = train(what, model=start(), tokenizer=tokenizer, out=options.out / name)
        dtype = torch.bfloat16 if fast_bf16() else None
        losses[name] = position_loss(model.eval(), texts, batch_size=8, autocast_dtype=dtype)
    rows = report(losses, recipe, config)
    print(record("from_scratch", rows))
    last = [line for line in history(options.out / "msa") if "lm_loss" in line][-1]
    print({key: round(value, 4) for key, value in last.items() if key.startswith(("lm", "kl"))})


def report(losses: dict, recipe, config: MSAConfig) -> list[dict]:
    """Rows of the table; the difference is paired by text, with its standard error."""
    change = compare(losses["dense"], losses["msa"])
    shape = f"3M bytes, {recipe.tokens} tokens, block {config.block_size}, top_k {config.top_k}"
    rows = [
        {
            "what": name,
            "shape": shape,
            "metric": "perplexity",
            "unit": "1",
            "p50": f"{loss.mean_perplexity:.5f}",
        }
        for name, loss in losses.items()
    ]
    error = change.mean_stderr
    rows.append(
        {
            "what": "msa against dense",
            "shape": shape,
            "metric": "perplexity change (p20, p80: one standard error)",
            "unit": "%",
            "p20": f"{100 * (change.perplexity_change - error):.3f}",
            "p50": f"{100 * change.perplexity_change:.3f}",
            "p80": f"{100 * (change.perplexity_change + error):.3f}",
        }
    )
    for row in rows:
        print(row["what"], row["metric"], row["p50"])
    return rows


if __name__ == "__main__":
    main()
