"""Several mechanisms made from one model, measured alike: what was found, as data and as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from openmsa import hf
from openmsa.evaluation.evidence import ModelEvidence, measure
from openmsa.evaluation.inspection import SelectionMap, selection_map
from openmsa.evaluation.passes import PassTime, pass_time
from openmsa.evaluation.perplexity import PairedDifference, compare
from openmsa.evaluation.retrieval import RetrievalPlan
from openmsa.inference.timing import DecodeTime, decode_time, filled_cache
from openmsa.mechanisms.window import WindowConfig

MAPPED_TEXTS = 4


@dataclass(frozen=True)
class Contender:
    """One mechanism after its training.

    config: its numbers in words. added_parameters: weights beside those of the dense model.
    cache_bytes: of one token in all layers. passes: prefill and training, by length. selection:
    None where nothing is chosen.
    """

    mechanism: str
    config: str
    train_tokens: int
    train_loss: float | None
    added_parameters: int
    cache_bytes: int
    evidence: ModelEvidence
    passes: tuple[PassTime, ...] = ()
    selection: SelectionMap | None = None

    def passes_of(self, kind: str) -> list[PassTime]:
        """Those of one kind, shortest first."""
        return sorted((p for p in self.passes if p.kind == kind), key=lambda p: p.num_tokens)


@dataclass(frozen=True)
class Comparison:
    """What the page shows. The first contender is the one that the others are compared with.

    start: what all of them were made from, in words. settings: {name: value} in words. commands:
    how to repeat it.
    """

    title: str
    start: str
    contenders: tuple[Contender, ...]
    settings: dict[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()

    @property
    def evidence(self) -> dict[str, ModelEvidence]:
        """{mechanism: what was measured of the model}."""
        return {c.mechanism: c.evidence for c in self.contenders}

    def changes(self) -> dict[str, PairedDifference]:
        """{mechanism: its loss minus that of the first contender, on the same tokens}."""
        first, *others = self.contenders
        reference = first.evidence.perplexity
        return {c.mechanism: compare(reference, c.evidence.perplexity) for c in others}


@dataclass(frozen=True)
class Lengths:
    """Which contexts and sequences are timed, in tokens."""

    decode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    training: tuple[int, ...] = ()


def contend(
    model,
    tokenizer,
    sequences: Tensor | Sequence[Tensor],
    *,
    plan: RetrievalPlan | None,
    train_tokens: int,
    train_loss: float | None = None,
    lengths: Lengths | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Contender:
    """Measure one trained model, dense or of any mechanism, in its present phase.

    The arguments of `evaluation.evidence.measure`, and what is timed. A dense model is timed with
    the dense attention of OpenMSA, which the others use too where they are dense.
    """
    how = {"autocast_dtype": autocast_dtype, "progress": progress}
    evidence = measure(model, tokenizer, sequences, plan=plan, **how)
    mechanism, config, added = hf.mechanism_of(model), _config(model), _added(model)
    selection = _map(model, sequences, autocast_dtype)
    with _our_dense(model):
        decode, passes = _timed(model, lengths or Lengths(), progress)
        return Contender(
            mechanism=mechanism,
            config=config,
            train_tokens=train_tokens,
            train_loss=train_loss,
            added_parameters=added,
            cache_bytes=_cache_bytes(model),
            evidence=replace(evidence, decode=decode),
            passes=passes,
            selection=selection,
        )


@contextmanager
def _our_dense(model) -> Iterator[None]:
    """A dense model attends by OpenMSA's own dense attention inside."""
    if hf.is_converted(model):
        yield
        return
    hf.set_phase(hf.convert(model, WindowConfig()), "dense")
    try:
        yield
    finally:
        hf.to_dense(model)


def _timed(
    model, lengths: Lengths, progress
) -> tuple[tuple[DecodeTime, ...], tuple[PassTime, ...]]:
    told = progress or (lambda what, done, total: None)
    decode, passes = [], []
    for context_tokens in lengths.decode:
        decode.append(decode_time(model, context_tokens))
        told("decoding time", len(decode), len(lengths.decode))
    for kind in ("prefill", "training"):
        for num_tokens in getattr(lengths, kind):
            passes.append(pass_time(model, num_tokens, kind=kind))
            told("passes", len(passes), len(lengths.prefill + lengths.training))
    return tuple(decode), tuple(passes)


def _config(model) -> str:
    """The numbers of its mechanism: "block_size=16, top_k=8"."""
    if not hf.is_converted(model):
        return "every visible key"
    numbers = vars(hf.config_of(model))
    return ", ".join(f"{name}={value}" for name, value in numbers.items() if value is not None)


def _added(model) -> int:
    if not hf.is_converted(model):
        return 0
    return sum(parameter.numel() for _, parameter in hf.added_parameters(model))


ROWS = ("keys", "values", "index_keys")


def _cache_bytes(model) -> int:
    """What one more token adds to the cache, what is pooled of whole windows included."""
    sizes = [_held(filled_cache(model, tokens)) for tokens in (2, 1)]
    layers = model.msa_attentions() if hf.is_converted(model) else []
    return round(sizes[0] - sizes[1] + sum(_pooled_bytes(attention) for attention in layers))


def _held(cache) -> int:
    rows = [getattr(layer, name, None) for layer in cache.layers for name in ROWS]
    return sum(x.numel() * x.element_size() for x in rows if x is not None)


@torch.no_grad()
def _pooled_bytes(attention) -> float:
    """Of a layer's cache and per token: a window takes its place once every stride tokens."""
    room = attention.msa_room
    if room.windows is None or attention.msa_phase == "dense":
        return 0.0
    kernel, stride = room.windows
    k = attention.k_proj.weight.new_zeros(1, kernel, attention.k_proj.out_features)
    k = k.unflatten(-1, (-1, attention.head_dim))
    rows = room.pool(attention, {"k": k, "v": k}).values()
    return sum(x.numel() * x.element_size() for x in rows) / stride


def _map(model, sequences, autocast_dtype) -> SelectionMap | None:
    if not hf.is_converted(model) or hf.room_of(model).budget is None:
        return None
    longest = max(len(sequence) for sequence in sequences)
    whole = [sequence for sequence in sequences if len(sequence) == longest][:MAPPED_TEXTS]
    return selection_map(model, whole, max_cells=64, autocast_dtype=autocast_dtype)


def rows(comparison: Comparison) -> list[dict]:
    """One row per number: mechanism, metric, context in tokens, value, unit, low, high."""
    found, changes = [], comparison.changes()
    for contender in comparison.contenders:

        def add(metric, value, unit, context="", low="", high="", name=contender.mechanism):
            keys = ("mechanism", "metric", "context", "value", "unit", "low", "high")
            found.append(dict(zip(keys, (name, metric, context, value, unit, low, high))))

        _quality_rows(contender, changes.get(contender.mechanism), add)
        for time in contender.evidence.decode:
            add("decode", time.median_ms, "ms/token", time.context_tokens, time.fastest_ms)
        for time in contender.passes:
            add(time.kind, time.median_ms, "ms", time.num_tokens, time.fastest_ms)
            if time.peak_bytes is not None:
                add(f"{time.kind} memory", time.peak_bytes, "bytes", time.num_tokens)
        add("cache", contender.cache_bytes, "bytes/token")
        add("added parameters", contender.added_parameters, "weights")
        add("training tokens", contender.train_tokens, "tokens")
    return found


def _quality_rows(contender: Contender, change: PairedDifference | None, add: Callable) -> None:
    losses, asked = contender.evidence.perplexity, contender.evidence.retrieval
    for row in losses.rows():
        error = row["loss_stderr"] or 0
        span = (row["loss"] - error, row["loss"] + error)
        add("loss", row["loss"], "nats", row["to_token"] + 1, *span)
    add("perplexity", losses.mean_perplexity, "")
    if change is not None:
        percent, error = (
            100 * change.perplexity_change,
            100 * (change.perplexity_change_stderr or 0),
        )
        add("perplexity change", percent, "%", "", percent - error, percent + error)
    for row in asked.rows() if asked is not None else ():
        add(row["task"], row["rate"], "right", row["context_tokens"], row["low"], row["high"])
    if contender.evidence.recall is not None:
        add("score recall", contender.evidence.recall.mean("score_recall"), "")
