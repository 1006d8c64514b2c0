"""All that is known about a conversion: three models measured alike, and how they came to be.

The converted model is judged against the dense one it came from; the control has the same sparse
attention with an index nobody trained. Without the control clearly worse, the test shows nothing.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from openmsa import hf
from openmsa.evaluation.inspection import Bearing, SelectionMap
from openmsa.evaluation.perplexity import PositionLoss, position_loss
from openmsa.evaluation.recall import Recall, evaluate_recall
from openmsa.evaluation.retrieval import RetrievalPlan, RetrievalResult, evaluate_retrieval
from openmsa.inference.timing import DecodeTime, decode_time

RECALL_QUERIES = 256  # per sequence; more move the third digit


@dataclass(frozen=True)
class ModelEvidence:
    """What was measured of one model; None or empty for what was not."""

    perplexity: PositionLoss | None = None
    retrieval: RetrievalResult | None = None
    recall: Recall | None = None
    decode: tuple[DecodeTime, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Something a model wrote after a long context. `answer`: what was right, if that is known."""

    model: str
    context_tokens: int
    opening: str
    question: str
    written: str
    answer: str | None = None


@dataclass(frozen=True)
class Evidence:
    """What a report shows. `training`: records of `openmsa.training.history`; `commands`: how to
    repeat.

    block_size in tokens, top_k in blocks: the budget. settings: {name: value} in words.
    """

    title: str
    block_size: int
    top_k: int
    dense: ModelEvidence
    converted: ModelEvidence
    control: ModelEvidence
    training: tuple[dict, ...] = ()
    selection: SelectionMap | None = None
    bearing: Bearing | None = None
    sample: Sample | None = None
    settings: dict[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()

    @property
    def budget_tokens(self) -> int:
        """Tokens that one query of one group may read."""
        return self.block_size * self.top_k

    @property
    def models(self) -> dict[str, ModelEvidence]:
        """The three by the names that tables and figures use."""
        names = ("dense", "converted", "untrained index")
        return dict(zip(names, (self.dense, self.converted, self.control), strict=True))


def measure(
    model,
    tokenizer,
    sequences: Tensor | Sequence[Tensor],
    *,
    plan: RetrievalPlan | None = None,
    decode_contexts: Sequence[int] = (),
    batch_size: int = 4,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ModelEvidence:
    """Measure one model, dense or converted, in its present phase.

    sequences: [n, t] int or n tensors [t_i] int, for perplexity and recall. plan: retrieval, left
    out if None. decode_contexts: tokens. `progress` is called with (what, done, in all). Recall is
    measured of converted models only. Raises ValueError as the single measurements do.
    """

    def told(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    common = {"batch_size": batch_size, "autocast_dtype": autocast_dtype}
    losses = position_loss(model, sequences, **common, progress=told("perplexity"))
    answers = recall = None
    if plan is not None:
        answers = evaluate_retrieval(model, tokenizer, plan, **common, progress=told("retrieval"))
    if hf.has_index(model):
        recall = evaluate_recall(
            model, sequences, max_queries=RECALL_QUERIES, **common, progress=told("recall")
        )
    times = []
    for number, context_tokens in enumerate(decode_contexts):
        times.append(decode_time(model, context_tokens))
        if progress is not None:
            progress("decoding time", number + 1, len(decode_contexts))
    return ModelEvidence(losses, answers, recall, tuple(times))


def machine_settings() -> dict[str, str]:
    """Versions, processor, devices and commit, in words, for `Evidence.settings`."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("openmsa", "torch", "transformers")
    return {
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(devices) or "cpu only",
        "commit": _commit(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the checkout this file lies in; "dirty" marks uncommitted changes."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return told.stdout.strip() or "not from a checkout"
