"""What a frozen index costs: a tiny MiniMax-M3 fine-tuned with and without its index learning.

The task is to look up. A context of filler holds pairs, each one token that says "item i has value
v"; after it, questions "what has item i?" are answered. The model learns this in one vocabulary,
its index with it, and is then fine-tuned on pairs and questions in another one, four times from
the same weights: with the index frozen, as transformers leaves it; with the index learning from its
KL on the blocks it selects; with half of the steps under full attention first, where it learns from
all blocks (a warm-up); and with full attention, the most that could be had. All of it once for
every seed, and the same number of steps in every way.

    python examples/m3_frozen_index.py             five minutes on two cores
    python examples/m3_frozen_index.py --seeds 1   less than two
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

from openmsa import hf
from openmsa.accounting.rows import common

ITEMS, VALUES, FILLER = 16, 8, 16
PAIRS = (0, ITEMS * VALUES)  # one vocabulary after the other
QUESTIONS = (2 * ITEMS * VALUES, 2 * ITEMS * VALUES + ITEMS)
ANSWERS = QUESTIONS[1] + ITEMS
MEASURED = 128  # contexts of new pairs, with a question on each pair
FILLERS = ANSWERS + VALUES
VOCABULARY = FILLERS + FILLER
WAYS = ("frozen index", "trained index", "warmed index", "full attention")


@dataclass(frozen=True)
class Lookup:
    """Batches of contexts of `tokens` tokens with all pairs in them, and a question on each."""

    tokens: int
    batch: int
    pairs: int
    questions: int

    def draw(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels [batch, tokens + 2 * ITEMS]; only answers are labelled."""
        made = torch.Generator().manual_seed(seed)
        rows = range(self.batch)
        context = FILLERS + torch.randint(FILLER, (self.batch, self.tokens), generator=made)
        values = torch.randint(VALUES, (self.batch, ITEMS), generator=made)
        places = torch.stack([torch.randperm(self.tokens, generator=made)[:ITEMS] for _ in rows])
        context.scatter_(1, places, self.pairs + torch.arange(ITEMS) * VALUES + values)
        order = torch.stack([torch.randperm(ITEMS, generator=made) for _ in rows])
        told = torch.stack([self.questions + order, ANSWERS + values.gather(1, order)], 2).flatten(
            1
        )
        labels = torch.full((self.batch, self.tokens + 2 * ITEMS), -100)
        labels[:, self.tokens + 1 :: 2] = told[:, 1::2]
        return torch.cat([context, told], 1), labels


def tiny_m3(tokens: int, seed: int) -> MiniMaxM3VLForCausalLM:
    """Two sparse layers that read 3 blocks of 8 tokens."""
    config = MiniMaxM3VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        dense_intermediate_size=128,
        shared_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        index_n_heads=2,
        index_head_dim=32,
        index_block_size=8,
        index_topk_blocks=3,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=2 * tokens + 64,
        layer_types=["minimax_m3_sparse"] * 2,
        mlp_layer_types=["dense", "sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return hf.enable(MiniMaxM3VLForCausalLM(config))


def train(model, task: Lookup, phase: str, steps: int, seed: int, index_loss_weight: float = 1.0):
    """A plain loop: the KL of the index is in the loss, and in the output to be told."""
    hf.set_phase(model, phase, index_loss_weight=index_loss_weight)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        ids, labels = task.draw(1000 * seed + step)
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def measure(model, task: Lookup) -> dict[str, float]:
    """Share of right answers, loss per answer, and how often a question's blocks hold its pair."""
    model.eval()
    ids, labels = replace(task, batch=MEASURED).draw(10**6)
    with hf.capture_attention(model) as calls:
        out = model(ids, labels=labels, use_cache=False)
    asked = labels[:, 1:] != -100
    right = (out.logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean()
    found = {"right": float(right), "loss": float(out.loss)}
    if calls[-1].selection is not None:
        found["found"] = float(max(_found(call.selection, ids, task) for call in calls))
    return found


def _found(selection, ids: torch.Tensor, task: Lookup) -> torch.Tensor:
    """The share of questions and groups whose selected blocks hold the pair that answers."""
    blocks = selection.blocks[:, :, task.tokens :: 2]  # [b, g, questions, k]
    item = ids[:, task.tokens :: 2] - task.questions
    pair = task.pairs + item * VALUES + ids[:, task.tokens + 1 :: 2] - ANSWERS
    place = (ids[:, None, : task.tokens] == pair[..., None]).int().argmax(-1)
    return (blocks == (place // selection.block_size)[:, None, :, None]).any(-1).float().mean()


def fine_tuned(model, way: str, task: Lookup, steps: int, seed: int) -> dict[str, float]:
    """`model` stays as it is; what its copy knows after fine-tuning in one of the ways."""
    made = copy.deepcopy(model)
    if way == "frozen index":
        for _, parameter in hf.index_parameters(made):
            parameter.requires_grad_(False)
    phases = {"warmed index": ("warmup", "sparse"), "full attention": ("dense",)}
    phases = phases.get(way, ("sparse",))
    for number, phase in enumerate(phases):
        train(made, task, phase, steps // len(phases), seed=100 * seed + 10 + number)
    return measure(made, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=250, help="of each of the three parts")
    parser.add_argument("--tokens", type=int, default=96, help="of context")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="models, from the first step on")
    parser.add_argument("--out", type=Path, help="a csv that rows are added to")
    given = parser.parse_args()
    every: dict[str, list[dict]] = {}
    for seed in range(given.seeds):
        for name, found in one_model(given, seed):
            every.setdefault(name, []).append(found)
    for name, found in every.items():
        means = {key: [one[key] for one in found] for key in found[0]}
        numbers = (f"{key} {_spread(values)}" for key, values in means.items())
        print(f"{name:15} {', '.join(numbers)}")
    if given.out is not None:
        write(given, every)


def one_model(given: argparse.Namespace, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """What one model knows of what it learned, and of the new vocabulary after each way."""
    before, after = (
        Lookup(given.tokens, given.batch, *vocabulary)
        for vocabulary in zip(PAIRS, QUESTIONS, strict=True)
    )
    model = train(tiny_m3(given.tokens, seed), before, "warmup", given.steps, seed=100 * seed)
    model = train(model, before, "sparse", given.steps, seed=100 * seed + 1)
    yield "before", measure(model, before)
    for way in WAYS:
        print(f"model {seed + 1} of {given.seeds}, fine-tuning: {way}", flush=True)
        yield way, fine_tuned(model, way, after, given.steps, seed)


def _spread(values: list[float]) -> str:
    """The mean and, of several, its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def write(given: argparse.Namespace, every: dict[str, list[dict]]) -> None:
    """One row of the csv for every number of every model."""
    asked = f"--steps {given.steps} --tokens {given.tokens} --seeds {given.seeds}"
    shared = common(f"python examples/m3_frozen_index.py {asked}")
    lines = [
        {
            "what": name,
            "shape": f"{given.tokens} tokens, {given.steps} steps",
            "data": task_of(name),
        }
        | {"seed": seed, "metric": key, "value": f"{value:.6g}", **shared}
        for name, found in every.items()
        for seed, one in enumerate(found)
        for key, value in one.items()
    ]
    new = not given.out.exists()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        if new:
            writer.writeheader()
        writer.writerows(lines)


def task_of(name: str) -> str:
    """Which vocabulary the questions of a row are in."""
    return "the vocabulary it has learned" if name == "before" else "the new vocabulary"


if __name__ == "__main__":
    main()
