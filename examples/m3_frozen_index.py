"""What a frozen index costs: a tiny MiniMax-M3 fine-tuned with and without its index learning.

The task is to look up. A context of filler holds pairs, each one token that says "item i has value
v"; after it, questions "what has item i?" are answered. The model learns to answer questions in one
vocabulary, its index with it, and is then fine-tuned on questions in another one, three times from
the same weights: with the index frozen, as transformers leaves it; with the index learning from its
KL; and with full attention, the most that could be had.

    python examples/m3_frozen_index.py                          about ten minutes on two cores
    python examples/m3_frozen_index.py --steps 250 --tokens 96  about two
"""

from __future__ import annotations

import argparse
import copy
import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

from openmsa import hf
from openmsa.accounting.rows import common

ITEMS, VALUES, FILLER = 16, 8, 16
PAIRS = 0
QUESTIONS = (ITEMS * VALUES, ITEMS * VALUES + ITEMS)  # one vocabulary of questions after the other
ANSWERS = QUESTIONS[1] + ITEMS
FILLERS = ANSWERS + VALUES
VOCABULARY = FILLERS + FILLER
WAYS = ("frozen index", "trained index", "full attention")


@dataclass(frozen=True)
class Lookup:
    """Batches of contexts of `tokens` tokens with all pairs in them, and a question on each."""

    tokens: int
    batch: int
    questions: int

    def draw(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels [batch, tokens + 2 * ITEMS]; only answers are labelled."""
        made = torch.Generator().manual_seed(seed)
        rows = range(self.batch)
        context = FILLERS + torch.randint(FILLER, (self.batch, self.tokens), generator=made)
        values = torch.randint(VALUES, (self.batch, ITEMS), generator=made)
        places = torch.stack([torch.randperm(self.tokens, generator=made)[:ITEMS] for _ in rows])
        context.scatter_(1, places, PAIRS + torch.arange(ITEMS) * VALUES + values)
        order = torch.stack([torch.randperm(ITEMS, generator=made) for _ in rows])
        told = torch.stack([self.questions + order, ANSWERS + values.gather(1, order)], 2).flatten(
            1
        )
        labels = torch.full((self.batch, self.tokens + 2 * ITEMS), -100)
        labels[:, self.tokens + 1 :: 2] = told[:, 1::2]
        return torch.cat([context, told], 1), labels


def tiny_m3(tokens: int) -> MiniMaxM3VLForCausalLM:
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
    torch.manual_seed(0)
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
    ids, labels = task.draw(10**6)
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
    pair = PAIRS + item * VALUES + ids[:, task.tokens + 1 :: 2] - ANSWERS
    place = (ids[:, None, : task.tokens] == pair[..., None]).int().argmax(-1)
    return (blocks == (place // selection.block_size)[:, None, :, None]).any(-1).float().mean()


def fine_tuned(model, way: str, task: Lookup, steps: int) -> dict[str, float]:
    """`model` stays as it is; what its copy knows after fine-tuning in one of the ways."""
    made = copy.deepcopy(model)
    if way == "frozen index":
        for _, parameter in hf.index_parameters(made):
            parameter.requires_grad_(False)
    phase = "dense" if way == "full attention" else "sparse"
    return measure(train(made, task, phase, steps, seed=2), task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of each of the three parts")
    parser.add_argument("--tokens", type=int, default=256, help="of context")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a csv that rows are added to")
    given = parser.parse_args()
    before, after = (Lookup(given.tokens, given.batch, questions) for questions in QUESTIONS)

    model = train(tiny_m3(given.tokens), before, "warmup", given.steps, seed=0)
    model = train(model, before, "sparse", given.steps, seed=1)
    rows = [("before", "questions it has learned", measure(model, before))]
    for way in WAYS:
        print(f"fine-tuning: {way}", flush=True)
        rows.append((way, "new questions", fine_tuned(model, way, after, given.steps)))
    for name, task, found in rows:
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        print(f"{name:15} {task:25} {numbers}")
    if given.out is not None:
        write(given, rows)


def write(given: argparse.Namespace, rows: list[tuple[str, str, dict]]) -> None:
    """One row of the csv for every number."""
    shared = common(f"python examples/m3_frozen_index.py --steps {given.steps}")
    lines = [
        {"what": name, "shape": f"{given.tokens} tokens, {given.steps} steps", "data": task}
        | {"metric": key, "value": f"{value:.6g}", **shared}
        for name, task, found in rows
        for key, value in found.items()
    ]
    new = not given.out.exists()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        if new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
