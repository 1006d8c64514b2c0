"""Phases and recipes as data: what is attended, what is trained, on how many tokens.

The paper's recipe (sections 3.2, 5.1) is: warm the index up under dense attention, with the KL over
the whole prefix, then train sparse, with the KL over the selected tokens added to the language
model loss.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches

from openmsa.training.data import DataConfig

ATTENTIONS = ("dense", "warmup", "sparse")
TRAINED = ("all", "index")
SCHEDULES = ("constant", "cosine", "linear")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Phase:
    """One stretch of training with fixed settings.

    attention: "dense", "warmup" (dense attention, index learns on the whole prefix; only where the
    mechanism has an index) or "sparse". trained: "all" parameters, or the "index" alone, which is
    all that a conversion adds. steps: optimiser steps. seq_len: tokens.
    batch_size: sequences per forward pass. accumulate: forward passes per step.
    index_loss_weight: lambda of the paper, times the sum of the layers' KL. decay_to: share of the
    learning rate left at the end of a "cosine" or "linear" schedule. data: what this phase reads,
    None for the recipe's.
    """

    name: str
    attention: str = "dense"
    trained: str = "all"
    steps: int = 100
    seq_len: int = 1024
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    schedule: str = "constant"
    decay_to: float = 0.1
    warmup_steps: int = 10
    weight_decay: float = 0.0
    index_loss_weight: float = 1.0
    checkpoint_activations: bool = False
    data: DataConfig | None = None

    def __post_init__(self) -> None:
        _one_of("attention", self.attention, ATTENTIONS)
        _one_of("trained", self.trained, TRAINED)
        _one_of("schedule", self.schedule, SCHEDULES)
        for name in ("steps", "seq_len", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} of phase {self.name!r} must be >= 1"
                )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")
        if not 0 <= self.decay_to <= 1:
            raise ValueError(f"decay_to={self.decay_to} must lie in [0, 1]")
        if self.trained == "index" and self.attention == "dense":
            raise ValueError(
                f"phase {self.name!r} trains the index under attention='dense', where it gets no "
                "gradient; use attention='warmup'"
            )
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} of a phase names a folder: not empty, no '/'")

    @property
    def tokens(self) -> int:
        """Tokens that this phase sees."""
        return self.steps * self.seq_len * self.batch_size * self.accumulate


@dataclass(frozen=True)
class Recipe:
    """Phases in their order, the data they read and everything else that fixes the result.

    precision: "fp32", "bf16" (autocast) or "auto": bf16 where the machine multiplies it faster.
    compile: torch.compile the model. log_every, save_every: steps.
    """

    name: str
    phases: tuple[Phase, ...]
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    precision: str = "auto"
    compile: bool = False
    log_every: int = 10
    save_every: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        _one_of("precision", self.precision, PRECISIONS)
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"phases={names} must be at least one, each with a name of its own")
        for name in ("log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")

    @property
    def tokens(self) -> int:
        """Tokens of all phases."""
        return sum(phase.tokens for phase in self.phases)

    def to_dict(self) -> dict:
        """The recipe as plain data, for json."""
        return asdict(self)


def recipe_from_dict(data: dict) -> Recipe:
    """Read a recipe back from plain data; a misspelt key is an error that names the nearest one."""
    top = dict(data)
    phases = tuple(_phase(phase) for phase in top.pop("phases", ()))
    config = _build(DataConfig, top.pop("data", {}), "data")
    return _build(Recipe, {**top, "phases": phases, "data": config}, "recipe")


def _phase(data: dict) -> Phase:
    phase = dict(data)
    if phase.get("data") is not None:
        phase["data"] = _build(DataConfig, phase["data"], "data of a phase")
    return _build(Phase, phase, "phase")


def _build(kind, data: dict, where: str):
    known = [item.name for item in fields(kind)]
    for key in data:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"keys: {', '.join(known)}"
            raise ValueError(f"{where} has no key {key!r}; {hint}")
    if "name" in known and "name" not in data:
        raise ValueError(f"{where} lacks the key 'name'")
    return kind(**data)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
