"""A small engine of its own, in the plainest torch and Python, with a joint for every mistake."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmsa.conformance import Cache, Inputs, NotOffered, Rule, TorchAdapter
from openmsa.conformance.case import Span


class Tiny(TorchAdapter):
    name = "tiny"

    def spans(self, x: Inputs) -> list[Span]:
        return x.spans()

    def position(self, one: Inputs) -> Tensor:
        t, s = one.q.shape[1], one.k.shape[1]
        return torch.arange(s - t, s)[:, None]

    def block(self, one: Inputs) -> Tensor:
        return torch.arange(one.k.shape[1]) // one.rule.block_size

    def visible(self, one: Inputs) -> Tensor:
        return torch.arange(one.k.shape[1]) <= self.position(one)

    # Choosing

    def select(self, x: Inputs) -> Tensor:
        b, t, g = x.q_index.shape[:3]
        blocks = torch.full((b, g, t, x.rule.top_k + 1), -1)
        for span in self.spans(x):
            one = x.only(span)
            if one.q.shape[1]:
                blocks[span.rows, :, span.queries] = self.choose(one)
        return blocks

    def scores(self, one: Inputs) -> Tensor:
        return torch.einsum("btgi,bsi->bgts", one.q_index, one.k_index).detach()

    def scored(self, one: Inputs) -> Tensor:
        """Which keys may raise the score of their block."""
        return self.visible(one)

    filling = -math.inf

    def best(self, one: Inputs) -> Tensor:
        size = one.rule.block_size
        scores = self.scores(one).masked_fill(~self.scored(one), -math.inf)
        short = -scores.shape[-1] % size
        scores = torch.nn.functional.pad(scores, (0, short), value=self.filling)
        return self.pool(scores.unflatten(-1, (-1, size)))

    def pool(self, scores: Tensor) -> Tensor:
        return scores.nan_to_num(nan=-math.inf, neginf=-math.inf).amax(-1)

    def choose(self, one: Inputs) -> Tensor:
        best, own = self.best(one), self.position(one).flatten() // one.rule.block_size
        blocks = torch.full((*best.shape[:3], one.rule.top_k + 1), -1)
        for b, g, i in torch.cartesian_prod(*map(torch.arange, best.shape[:3])).tolist():
            seen = range(min(int(own[i]) + 1, best.shape[3]))
            forced = [n for n in seen if self.forced(n, int(own[i]), one.rule)]
            score = best[b, g, i].tolist()
            others = sorted(set(seen) - set(forced), key=lambda n: self.order(score[n], n))
            kept = self.kept(forced, others, one.rule.top_k)
            blocks[b, g, i, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        return blocks

    def forced(self, n: int, own: int, rule: Rule) -> bool:
        return n > own - rule.local_blocks or n < rule.sink_blocks

    def order(self, score: float, n: int):
        return (-score, n)

    def kept(self, forced: list[int], others: list[int], top_k: int) -> list[int]:
        return (forced + others)[:top_k]

    # Attending

    def attend(self, x: Inputs) -> tuple[Tensor, Tensor]:
        out = x.q.new_zeros(*x.q.shape[:3], x.v.shape[3])
        lse = x.q.new_zeros(x.q.shape[:3])
        for span in self.spans(x):
            part, its_lse, _ = self.one(x.only(span))
            out, lse = out.clone(), lse.clone()
            out[span.rows, span.queries] = part
            lse[span.rows, span.queries] = its_lse
        return out, lse

    def times_read(self, one: Inputs) -> Tensor:
        """How often a query reads a key, [b, g, t, s]."""
        seen = self.visible(one)
        if one.rule.phase == "warmup":
            return seen.long().expand(one.q.shape[0], one.k.shape[2], -1, -1)
        return (one.blocks[..., None] == self.block(one)).any(-2) * seen.long()

    def group(self, tensor: Tensor, heads: int) -> Tensor:
        return tensor.repeat_interleave(heads // tensor.shape[2], 2)

    def scale(self, one: Inputs) -> float:
        return one.scale

    def one(self, one: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse, and the weights of the heads [b, h, t, s], of one sequence."""
        h = one.q.shape[2]
        k, v = self.group(one.k, h), self.group(one.v, h)
        logits = torch.einsum("bthd,bshd->bhts", one.q, k) * self.scale(one)
        times = self.group(self.times_read(one).transpose(1, 2), h).transpose(1, 2)
        logits = logits + times.to(logits.dtype).log()
        weights = self.softmax(logits, times)
        return torch.einsum("bhts,bshd->bthd", weights, v), self.lse(logits), weights

    def softmax(self, logits: Tensor, times: Tensor) -> Tensor:
        nothing = (times == 0).all(-1, keepdim=True)
        return logits.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)

    def lse(self, logits: Tensor) -> Tensor:
        return logits.logsumexp(-1).transpose(1, 2).detach()

    # The loss

    def loss(self, x: Inputs) -> Tensor:
        total = weight = 0.0
        for span in self.spans(x):
            one = x.only(span)
            kl, w = self.kl(one), self.weights(one)
            total = total + (w[:, None] * kl).sum()
            weight += self.counted(w) * one.k.shape[2]
        return total / weight

    def weights(self, one: Inputs) -> Tensor:
        return torch.ones(one.q.shape[:2]) if one.row_weights is None else one.row_weights

    def counted(self, weights: Tensor) -> float:
        return float(weights.sum())

    def student_scale(self, one: Inputs) -> float:
        return one.index_scale

    def support(self, one: Inputs) -> Tensor:
        return self.times_read(one) > 0

    def teacher(self, one: Inputs, read: Tensor) -> Tensor:
        weights = self.one(one)[2]
        return weights.unflatten(1, (one.k.shape[2], -1)).mean(2)

    def kl(self, one: Inputs) -> Tensor:
        read = self.support(one)
        teacher = self.stopped(self.teacher(one, read))
        student = torch.einsum("btgi,bsi->bgts", one.q_index, one.k_index)
        student = (student * self.student_scale(one)).masked_fill(~read, -math.inf)
        return self.distance(teacher, student.log_softmax(-1).masked_fill(~read, 0)).sum(-1)

    def stopped(self, teacher: Tensor) -> Tensor:
        return teacher.detach()

    def distance(self, teacher: Tensor, log_student: Tensor) -> Tensor:
        return torch.xlogy(teacher, teacher) - teacher * log_student

    # The cache

    def open_cache(self, rule: Rule) -> Cache:
        return TinyCache(self)


class TinyCache(Cache):
    def __init__(self, engine: Tiny):
        self.engine, self.held = engine, {}

    def append(self, x: Inputs) -> Tensor:
        new = {"k": x.k, "v": x.v, "k_index": x.k_index}
        new |= {} if x.mask is None else {"mask": x.mask}
        self.held = {n: torch.cat([self.held[n], y], 1) if self.held else y for n, y in new.items()}
        self.held["k_index"] = self.held["k_index"][:, : self.held["k"].shape[1]]
        x = x.replace(**self.held)
        return self.engine.attend(x.replace(blocks=self.engine.select(x)))[0]

    def change(self, change) -> None:
        self.held = {name: change(tensor, name) for name, tensor in self.held.items()}

    def crop(self, length: int) -> None:
        self.change(lambda tensor, name: tensor[:, :length])

    def reorder(self, rows: tuple[int, ...]) -> None:
        self.change(lambda tensor, name: tensor[list(rows)])

    def reload(self) -> None:
        self.change(lambda tensor, name: tensor.clone())


class OnlyAttends(TorchAdapter):
    """An engine with nothing else to offer, for inputs of one layout."""

    name = "only attends"

    def attend(self, x: Inputs) -> tuple[Tensor, None]:
        if x.packed or x.mask is not None:
            raise NotOffered("packed or padded sequences")
        return Tiny().attend(x)[0], None
