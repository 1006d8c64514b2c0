"""Made-up evidence: numbers of a conversion that went well, and ways to spoil it."""

from __future__ import annotations

from itertools import pairwise

from openmsa.evaluation.comparison import Contender
from openmsa.evaluation.evidence import Evidence, ModelEvidence, Sample
from openmsa.evaluation.inspection import Bearing, LayerBearing, SelectionMap
from openmsa.evaluation.passes import PassTime
from openmsa.evaluation.perplexity import PositionLoss
from openmsa.evaluation.recall import LayerRecall, Recall
from openmsa.evaluation.retrieval import RetrievalResult
from openmsa.inference.timing import DecodeTime

EDGES = (1, 64, 128, 256, 512, 1024)
TASKS = ("passkey", "key_value")
LENGTHS, DEPTHS, CELL = (256, 1024), (0.0, 0.5, 1.0), 16
BLOCKS = 12


def losses(extra: float, texts: int = 6) -> PositionLoss:
    """Loss that falls with the position, differs between texts, and lies `extra` nats higher."""
    counts = tuple(b - a for a, b in pairwise(EDGES))
    sums = tuple(
        tuple(
            count * (1.3 - 0.08 * bucket + 0.05 * text + extra * (1 + 0.1 * (text % 3)))
            for bucket, count in enumerate(counts)
        )
        for text in range(texts)
    )
    return PositionLoss(EDGES, sums, (counts,) * texts, "made-up")


def answers(rate: float, long_rate: float | None = None) -> RetrievalResult:
    """The same share of right answers in every cell; another at the longest context if given."""
    rates = (rate, rate if long_rate is None else long_rate)
    grid = tuple(tuple(round(CELL * r) for _ in DEPTHS) for r in rates)
    return RetrievalResult(TASKS, LENGTHS, DEPTHS, dict.fromkeys(TASKS, grid), CELL, 0)


def recall(score: float) -> Recall:
    """Two layers of two groups whose score recall is near `score`."""
    layers = tuple(
        LayerRecall(
            n, (score - 0.2,) * 2, (score - 0.01 * n,) * 2, (0.9 * score,) * 2, (0.9,) * 2, 640
        )
        for n in (0, 3)
    )
    return Recall(layers, 16, 8)


def times(scale: float) -> tuple[DecodeTime, ...]:
    """Milliseconds that grow with the context by `scale`."""
    return tuple(DecodeTime(2**k, 1 + scale * 2**k / 1024, 0.9, 16) for k in range(10, 17, 2))


def training_log() -> tuple[dict, ...]:
    """Records of two phases: losses every step, recall every second."""
    log = []
    for step in range(24):
        phase = "warmup" if step < 12 else "sparse"
        record = {"phase": phase, "tokens": 8192 * (step + 1), "step": step % 12 + 1}
        record |= {"lm_loss": 0.9 - 0.004 * step + 0.01 * (step % 3)}
        record |= {f"kl/layer_{n}": 0.5 / (1 + step + n) for n in (0, 3)}
        log.append(record)
        if step % 2 == 0:
            gain = 0.3 * step / (step + 3)
            marks = {
                f"{m}/layer_{n}": 0.6 + gain + 0.01 * n
                for m in ("block_recall", "score_recall", "captured_mass")
                for n in (0, 3)
            }
            log.append({"phase": phase, "tokens": record["tokens"], "step": step % 12 + 1, **marks})
    return tuple(log)


def selection() -> SelectionMap:
    """Two layers of two groups: own block, first block, a little of the rest."""

    def cell(q: int, n: int, group: int) -> float | None:
        if n > q:
            return None
        return 1.0 if n == q or q < 8 else (0.7 if n == 0 else 0.1 * (1 + group) * ((q + n) % 4))

    group_maps = tuple(
        tuple(tuple(cell(q, n, group) for n in range(BLOCKS)) for q in range(BLOCKS))
        for group in range(2)
    )
    return SelectionMap((0, 3), 16, 8, 1, 16 * BLOCKS, (group_maps, group_maps))


def bearing() -> Bearing:
    """One layer of each verdict."""
    layers = (
        LayerBearing(0, 0.93, 0.70, 0.75, 0.6, "train"),
        LayerBearing(1, 0.97, 0.95, 0.98, 0.8, "ready"),
        LayerBearing(2, 0.72, 0.60, 0.83, 0.7, "keep dense"),
    )
    return Bearing(layers, 16, 8, 0.8, 640)


def evidence(**changes) -> Evidence:
    """A conversion that meets every criterion; name a field to change it."""
    fields = {
        "title": "Made-up <conversion> & report",
        "block_size": 16,
        "top_k": 8,
        "dense": ModelEvidence(losses(0.0), answers(1.0), None, times(0.4)),
        "converted": ModelEvidence(losses(0.004), answers(1.0), recall(0.95), times(0.05)),
        "control": ModelEvidence(losses(0.3), answers(0.5, 0.1), recall(0.5), ()),
        "training": training_log(),
        "selection": selection(),
        "bearing": bearing(),
        "sample": Sample("converted", 4096, "@pass = 4821\n…", "@pass = ", "4821", "4821"),
        "settings": {"model": "a <b>bold</b> model", "seed": "0"},
        "commands": ("make demo",),
    }
    return Evidence(**{**fields, **changes})


def contender(name: str, number: int) -> Contender:
    """Made up: worse and faster the higher `number` is."""
    evidence = ModelEvidence(
        losses(0.01 * number),
        answers(1 - number / 16),
        recall(0.95) if name in ("msa", "dsa") else None,
        times(0.1 / (1 + number)),
    )
    lengths = {"prefill": (512, 2048), "training": (512,)}
    passes = [
        PassTime(kind, n, n / (10 + number), n / (12 + number), None if number % 2 else 1000 * n, 3)
        for kind, longer in lengths.items()
        for n in longer
    ]
    chosen = None if name in ("dense", "window") else selection()
    return Contender(name, "top_k=8", 640, 1.5, 10 * number, 512, evidence, (*passes,), chosen)
