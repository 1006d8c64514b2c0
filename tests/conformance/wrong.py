"""Engines that are wrong in one respect each, by the case that must catch them."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from openmsa.conformance import Inputs, Rule
from openmsa.conformance.case import Span
from tests.conformance.tiny import Tiny, TinyCache


class PoolsByMean(Tiny):
    def pool(self, scores: Tensor) -> Tensor:
        seen = scores.isfinite()
        return scores.masked_fill(~seen, 0).sum(-1) / seen.sum(-1).clamp(min=1)


class ForgetsTheStudentsScale(Tiny):
    def student_scale(self, one: Inputs) -> float:
        return 1.0


class LetsTheLossReachTheTeacher(Tiny):
    def stopped(self, teacher: Tensor) -> Tensor:
        return teacher


class TurnsTheDivergenceRound(Tiny):
    def distance(self, teacher: Tensor, log_student: Tensor) -> Tensor:
        return log_student.exp() * (log_student - teacher.clamp(min=1e-30).log())


class RoundsScores(Tiny):
    def scores(self, one: Inputs) -> Tensor:
        return super().scores(one).bfloat16().float()


class TakesLogarithmsToBase2(Tiny):
    def lse(self, logits: Tensor) -> Tensor:
        return super().lse(logits) / math.log(2)


class SharesOneSelection(Tiny):
    def best(self, one: Inputs) -> Tensor:
        best = super().best(one)
        return best.amax(1, keepdim=True).expand_as(best)


class MasksBlocksOnly(Tiny):
    def visible(self, one: Inputs) -> Tensor:
        return self.block(one) <= self.position(one) // one.rule.block_size


class ScoresTheFuture(Tiny):
    def scored(self, one: Inputs) -> Tensor:
        return self.block(one) <= self.position(one) // one.rule.block_size


class PrefersLaterBlocks(Tiny):
    def order(self, score: float, n: int):
        return (-score, -n)


class DividesByZero(Tiny):
    def softmax(self, logits: Tensor, times: Tensor) -> Tensor:
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True) / logits.nan_to_num(neginf=0).abs().amax()


class OrdersByBits(Tiny):
    def scores(self, one: Inputs) -> Tensor:
        negative = one.k_index.signbit().all(-1)[:, None, None]
        scores = super().scores(one)
        return torch.where((scores == 0) & negative, -1e-30, scores)


class RanksNanFirst(Tiny):
    def pool(self, scores: Tensor) -> Tensor:
        return scores.nan_to_num(nan=math.inf, neginf=-math.inf).amax(-1)


class LetsNanReachTheRow(Tiny):
    def best(self, one: Inputs) -> Tensor:
        spoilt = self.scores(one).isnan().any(-1, keepdim=True)
        return super().best(one).masked_fill(spoilt, 0.0)


class ReadsEmptySlots(Tiny):
    def times_read(self, one: Inputs) -> Tensor:
        if one.rule.phase == "warmup":
            return super().times_read(one)
        times = (one.blocks.clamp(min=0)[..., None] == self.block(one)).sum(-2)
        return times * self.visible(one).long()


class CountsBlocksFromTheSlot(Tiny):
    def spans(self, x: Inputs) -> list[Span]:
        if x.mask is None:
            return super().spans(x)
        whole = (slice(0, x.q.shape[1]), slice(0, x.k.shape[1]))
        return [Span(slice(row, row + 1), *whole) for row in range(x.q.shape[0])]


class DividesByRows(CountsBlocksFromTheSlot):
    def counted(self, weights: Tensor) -> float:
        return float(weights.numel())


class SeesOneSequence(Tiny):
    def spans(self, x: Inputs) -> list[Span]:
        return [Span(slice(None), slice(None), slice(None))]


class LosesEmptySequences(Tiny):
    def spans(self, x: Inputs) -> list[Span]:
        if not x.packed:
            return super().spans(x)
        borders = [sorted(set(y.tolist())) for y in (x.cu_seqlens_q, x.cu_seqlens_k)]
        pairs = ([slice(*two) for two in pairwise(y)] for y in borders)
        return [Span(slice(0, 1), *pair) for pair in zip(*pairs)]


class StartsAtZero(Tiny):
    def position(self, one: Inputs) -> Tensor:
        return torch.arange(one.q.shape[1])[:, None]


class RoundsToBlocks(Tiny):
    def position(self, one: Inputs) -> Tensor:
        position = super().position(one)
        start = int(position[0]) // one.rule.block_size * one.rule.block_size
        return position - position[0] + start


class FillsWithZeros(Tiny):
    filling = 0.0


class DropsTheTail(Tiny):
    def times_read(self, one: Inputs) -> Tensor:
        whole = one.k.shape[1] // one.rule.block_size
        return super().times_read(one) * (self.block(one) < whole).long()


class LetsForcedBlocksCompete(Tiny):
    def forced(self, n: int, own: int, rule: Rule) -> bool:
        return False


class KeepsForcedBlocksBeside(Tiny):
    def kept(self, forced: list[int], others: list[int], top_k: int) -> list[int]:
        return forced + others[: top_k + 1 - len(forced)]


class KeepsOneLocalBlock(Tiny):
    def forced(self, n: int, own: int, rule: Rule) -> bool:
        return n == own or n < rule.sink_blocks


class KnowsNoSinks(Tiny):
    def forced(self, n: int, own: int, rule: Rule) -> bool:
        return n > own - rule.local_blocks


class LeavesNan(Tiny):
    def softmax(self, logits: Tensor, times: Tensor) -> Tensor:
        return logits.softmax(-1)


class AveragesEverything(Tiny):
    def softmax(self, logits: Tensor, times: Tensor) -> Tensor:
        return logits.clamp(min=-1e30).softmax(-1)


class AveragesHeadsFirst(Tiny):
    def teacher(self, one: Inputs, read: Tensor) -> Tensor:
        dense = one.replace(blocks=torch.arange(99).expand(*one.blocks.shape[:3], -1))
        mean = super().teacher(dense, read) * read
        return mean / mean.sum(-1, keepdim=True)


class WarmsUpOnBlocks(Tiny):
    def support(self, one: Inputs) -> Tensor:
        chosen = self.choose(one)
        return (chosen[..., None] == self.block(one)).any(-2) & self.visible(one)

    def teacher(self, one: Inputs, read: Tensor) -> Tensor:
        mean = super().teacher(one, read) * read
        return mean / mean.sum(-1, keepdim=True)


class ForgetsTheMaximum(Tiny):
    def softmax(self, logits: Tensor, times: Tensor) -> Tensor:
        weights = logits.exp()
        return weights / weights.sum(-1, keepdim=True)


class KnowsOneScale(Tiny):
    def scale(self, one: Inputs) -> float:
        return one.q.shape[-1] ** -0.5


class InterleavesHeads(Tiny):
    def group(self, tensor: Tensor, heads: int) -> Tensor:
        return tensor.repeat(*([1, 1, heads // tensor.shape[2]] + [1] * (tensor.dim() - 3)))


class KnowsOneBlockSize(Tiny):
    def block(self, one: Inputs) -> Tensor:
        return torch.arange(one.k.shape[1]) // 4


def cached(make):
    """A class of engine whose cache is what `make` says."""

    class Cached(Tiny):
        def open_cache(self, rule: Rule) -> TinyCache:
            return make(self)

    Cached.__name__ = make.__name__
    return Cached


class ForgetsIndexKeys(TinyCache):
    def append(self, x: Inputs) -> Tensor:
        if self.held:
            self.held["k_index"] = torch.zeros_like(self.held["k_index"])
        return super().append(x)


class CropsNoIndex(TinyCache):
    def crop(self, length: int) -> None:
        self.change(lambda tensor, name: tensor if name == "k_index" else tensor[:, :length])


class ReordersNoIndex(TinyCache):
    def reorder(self, rows: tuple[int, ...]) -> None:
        whole = list(range(len(rows)))
        self.change(lambda tensor, name: tensor[whole if name == "k_index" else list(rows)])


class ReloadsNoIndex(TinyCache):
    def reload(self) -> None:
        self.change(lambda y, name: torch.zeros_like(y) if name == "k_index" else y)


class CropsWholeBlocks(TinyCache):
    def crop(self, length: int) -> None:
        whole = -(-length // 4) * 4
        self.change(lambda y, name: y[:, : whole if name == "k_index" else length])


WRONG = {
    "plain": (
        PoolsByMean,
        RoundsScores,
        ForgetsTheStudentsScale,
        LetsTheLossReachTheTeacher,
        TurnsTheDivergenceRound,
        TakesLogarithmsToBase2,
    ),
    "groups": (SharesOneSelection,),
    "token_mask": (MasksBlocksOnly,),
    "score_mask": (ScoresTheFuture,),
    "ties": (PrefersLaterBlocks,),
    "zeros": (PrefersLaterBlocks, DividesByZero),
    "signed_zeros": (OrdersByBits,),
    "nan_scores": (RanksNanFirst, LetsNanReachTheRow),
    "few_blocks": (ReadsEmptySlots,),
    "left_padding": (CountsBlocksFromTheSlot,),
    "right_padding": (DividesByRows,),
    "packing": (SeesOneSequence,),
    "empty_sequence": (LosesEmptySequences,),
    "offset": (StartsAtZero, RoundsToBlocks),
    "short_tail": (FillsWithZeros, DropsTheTail),
    "local_competes": (LetsForcedBlocksCompete, KeepsForcedBlocksBeside),
    "local_blocks": (KeepsOneLocalBlock,),
    "sink_blocks": (KnowsNoSinks, KeepsForcedBlocksBeside),
    "no_selection": (LeavesNan, AveragesEverything),
    "row_weights": (DividesByRows,),
    "head_order": (AveragesHeadsFirst,),
    "warmup": (WarmsUpOnBlocks,),
    "large_logits": (ForgetsTheMaximum,),
    "scales": (KnowsOneScale,),
    "odd_shape": (InterleavesHeads,),
    "wide": (KnowsOneBlockSize,),
    "cache_decode": (cached(ForgetsIndexKeys),),
    "cache_chunks": (RoundsToBlocks,),
    "cache_crop": (cached(CropsNoIndex),),
    "cache_reorder": (cached(ReordersNoIndex),),
    "cache_reload": (cached(ReloadsNoIndex),),
    "cache_padding": (CountsBlocksFromTheSlot,),
    "cache_prefix": (cached(CropsWholeBlocks),),
}
