"""Whole recipes: functions that return a complete configuration.

A small byte model needs minutes where the paper's needs weeks, but the order of the phases is the
paper's (section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from openmsa.training.data import DataConfig
from openmsa.training.phases import Phase, Recipe

# Text and documents in which something has to be found; lists of pairs, where every block looks
# alike, are the hardest and come twice as often.
FINDING = DataConfig(retrieval_share=0.6, tasks=("passkey", "multi_key", "key_value", "key_value"))


def dense_byte_3m() -> Recipe:
    """The dense model that ships with OpenMSA: 3M parameters, bytes as tokens.

    In a mixture, the few bytes that answer a question are lost among those of the text. So after a
    first stretch of both, a phase on short lists of pairs teaches looking up; longer sequences then
    carry it to longer distances, the last of them with long lists of pairs in three of ten.
    """
    lists = DataConfig(retrieval_share=0.9, tasks=("key_value",))
    common = {"weight_decay": 0.1, "attention": "dense"}
    steady = {"learning_rate": 3e-3, "warmup_steps": 100, **common}
    falling = {"schedule": "linear", "decay_to": 0.02, **steady}
    far = {**falling, "learning_rate": 1e-3, "data": FINDING}
    return Recipe(
        name="dense-byte-3m",
        data=DataConfig(source="stdlib", retrieval_share=0.5),
        phases=(
            Phase("short", steps=600, seq_len=256, batch_size=24, **steady),
            Phase("lists", steps=600, seq_len=160, batch_size=32, data=lists, **steady),
            Phase("middle", steps=200, seq_len=640, batch_size=12, **steady),
            Phase("long", steps=500, seq_len=1536, batch_size=5, **falling),
            Phase("far", steps=600, seq_len=2048, batch_size=4, **far),
        ),
        precision="bf16",
        compile=True,
        log_every=20,
        save_every=200,
    )


def msa_cpt(warm_steps: int = 80, sparse_steps: int = 60) -> Recipe:
    """Conversion of a trained dense model (MSA-CPT): the index alone, then everything, sparse.

    The default lengths suit the shipped model. The sparse phase decays to nothing, as the end of a
    continued pre-training does.
    """
    sizes = {"seq_len": 2048, "batch_size": 3}
    return Recipe(
        name="msa-cpt",
        data=FINDING,
        phases=(
            Phase(
                "warm",
                attention="warmup",
                trained="index",
                steps=warm_steps,
                learning_rate=2e-3,
                schedule="linear",
                warmup_steps=min(5, warm_steps),
                **sizes,
            ),
            Phase(
                "sparse",
                attention="sparse",
                steps=sparse_steps,
                learning_rate=2e-4,
                schedule="linear",
                decay_to=0.0,
                warmup_steps=min(5, sparse_steps),
                **sizes,
            ),
        ),
        log_every=5,
        save_every=50,
    )


def msa_pt(warm_steps: int = 60, sparse_steps: int = 200) -> Recipe:
    """From scratch (MSA-PT): dense attention and the index on the whole prefix, then sparse."""
    sizes = {"seq_len": 512, "batch_size": 12, "learning_rate": 3e-3, "weight_decay": 0.1}
    return Recipe(
        name="msa-pt",
        data=DataConfig(source="stdlib", retrieval_share=0.0),
        phases=(
            Phase("warm", attention="warmup", steps=warm_steps, warmup_steps=50, **sizes),
            Phase(
                "sparse",
                attention="sparse",
                steps=sparse_steps,
                schedule="linear",
                decay_to=0.02,
                warmup_steps=10,
                **sizes,
            ),
        ),
        save_every=100,
    )


def dense_twin(recipe: Recipe) -> Recipe:
    """The same recipe for a dense model: the same tokens in the same order, dense attention.

    Where `recipe` trains the index alone, the twin trains on those tokens as well, at the first
    learning rate at which `recipe` trains everything: it never sees fewer tokens.
    """
    rate = next((p.learning_rate for p in recipe.phases if p.trained == "all"), None)
    if rate is None:
        raise ValueError(f"recipe {recipe.name!r} never trains the backbone: it has no dense twin")
    phases = []
    for phase in recipe.phases:
        if phase.trained == "index":
            phase = replace(phase, trained="all", learning_rate=rate, schedule="constant")
        phases.append(replace(phase, attention="dense"))
    return replace(recipe, name=f"{recipe.name}-dense-twin", phases=tuple(phases))


def fitted(recipe: Recipe, model) -> Recipe:
    """The same recipe for the mechanism of `model`: the same tokens in the same order.

    Where the mechanism has no warm-up (it has no index), that phase becomes a sparse one that
    trains everything, at the first learning rate at which `recipe` does; so does a phase that would
    train additions where there are none. For a dense model, the dense twin. A recipe that fits
    comes back as it is.
    """
    from openmsa import hf

    if all(phase.attention == "dense" for phase in recipe.phases):
        return recipe
    if not hf.is_converted(model):
        return dense_twin(recipe)
    room = hf.room_of(model)
    rate = next((p.learning_rate for p in recipe.phases if p.trained == "all"), None)
    made = []
    for phase in recipe.phases:
        lacking = phase.attention not in room.PHASES
        if phase.trained == "index" and (lacking or not room.ADDED):
            if rate is None:
                raise ValueError(
                    f"recipe {recipe.name!r} trains additions alone, which {room.NAME} lacks or "
                    "cannot warm up; add a phase with trained='all'"
                )
            phase = replace(phase, trained="all", learning_rate=rate, schedule="constant")
        made.append(replace(phase, attention="sparse") if lacking else phase)
    if tuple(made) == recipe.phases:
        return recipe
    return replace(recipe, name=f"{recipe.name}-{room.NAME}", phases=tuple(made))


def msa_cpt_dense_twin() -> Recipe:
    """The dense twin of `msa_cpt`."""
    return dense_twin(msa_cpt())


def msa_pt_dense_twin() -> Recipe:
    """The dense twin of `msa_pt`."""
    return dense_twin(msa_pt())


RECIPES: dict[str, Callable[[], Recipe]] = {
    "dense-byte-3m": dense_byte_3m,
    "msa-cpt": msa_cpt,
    "msa-cpt-dense-twin": msa_cpt_dense_twin,
    "msa-pt": msa_pt,
    "msa-pt-dense-twin": msa_pt_dense_twin,
}
