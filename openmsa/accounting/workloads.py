"""Shapes that a serving and a training system have seen (workloads.json names the source)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

SUITES = ("prefill", "decode", "training")


@dataclass(frozen=True)
class Case:
    """Packed sequences: query i of a sequence is one of its last query_lens tokens.

    weight: how much of the suite it stands for. scaled: what was made smaller, empty if nothing.
    """

    suite: str
    name: str
    weight: int
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    scaled: str = ""

    def fitted(self, most_queries: int, most_keys: int) -> Case:
        """With at most so many tokens in all: fewer requests where there are many alike, else
        every length halved as often as needed.
        """
        asked = len(self.query_lens)
        if self.suite == "decode":
            # Requests differ by a quarter at most; whoever fits comes first.
            keep = max(1, min(asked, most_keys * asked // sum(self.key_lens)))
            while keep > 1 and sum(self.key_lens[:keep]) > most_keys:
                keep -= 1
            if keep < asked:
                words = f"{keep} of {asked} requests"
                return replace(
                    self,
                    query_lens=self.query_lens[:keep],
                    key_lens=self.key_lens[:keep],
                    scaled=words,
                ).fitted(most_queries, most_keys)
        factor, case = 1, self
        while sum(case.query_lens) > most_queries or sum(case.key_lens) > most_keys:
            factor *= 2
            queries = tuple(max(1, n // factor) for n in self.query_lens)
            keys = tuple(max(q, n // factor) for q, n in zip(queries, self.key_lens))
            words = f"lengths divided by {factor}"
            scaled = f"{self.scaled}, {words}" if self.scaled else words
            case = replace(self, query_lens=queries, key_lens=keys, scaled=scaled)
            if factor > 1 << 20:
                raise ValueError(
                    f"{self.name} has {asked} sequences and does not fit {most_queries} queries "
                    f"and {most_keys} keys; allow more"
                )
        return case


def cases(suite: str) -> list[Case]:
    """The cases of "prefill", "decode" or "training", the heaviest first."""
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    data = json.loads((Path(__file__).parent / "workloads.json").read_text(encoding="utf-8"))
    found = {"prefill": _prefill, "decode": _decode, "training": _training}[suite](data[suite])
    return sorted(found, key=lambda case: -case.weight)


def _prefill(data: list) -> list[Case]:
    found = []
    for number, (weight, new, cached) in enumerate(data):
        keys = tuple(q + p for q, p in zip(new, cached))
        name = f"call {number}: {sum(new):,} new tokens in {len(new)} of {max(keys):,}"
        found.append(Case("prefill", name, weight, tuple(new), keys))
    return found


def _decode(data: dict) -> list[Case]:
    found = []
    for nominal, weights in data["weights"].items():
        for requests, weight in zip(data["batch_sizes"], weights):
            keys = _spread(int(nominal), requests)
            queries = (data["query_tokens"],) * requests
            name = f"{requests} requests of {data['query_tokens']} tokens after {int(nominal):,}"
            found.append(Case("decode", name, weight, queries, keys))
    return found


def _spread(nominal: int, requests: int) -> tuple[int, ...]:
    """Pairs above and below the nominal length by a twentieth to a quarter of it."""
    generator = torch.Generator().manual_seed(nominal + 1009 * requests)
    away = torch.randint(nominal // 20, nominal // 4 + 1, (requests // 2,), generator=generator)
    pairs = torch.stack([nominal - away, nominal + away], 1).flatten().tolist()
    return tuple(pairs + [nominal] * (requests % 2))


def _training(data: list) -> list[Case]:
    return [
        Case("training", name, weight, *(tuple(lens) for lens in zip(*pieces)))
        for weight, name, pieces in data
    ]
