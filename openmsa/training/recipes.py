"""Whole recipes: functions that return a complete configuration.

A small byte model needs minutes where the paper's needs weeks, but the order of the phases is the
paper's (section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable

from openmsa.training.data import DataConfig
from openmsa.training.phases import Phase, Recipe


def dense_byte_3m() -> Recipe:
    """The dense model that ships with OpenMSA: 3M parameters, bytes as tokens.

    Short sequences first: looking a pair up is learned there in a few million tokens and carries
    over to long ones, while a model that starts long does not find it.
    """
    common = {"weight_decay": 0.1, "attention": "dense"}
    return Recipe(
        name="dense-byte-3m",
        data=DataConfig(source="stdlib", retrieval_share=0.5),
        phases=(
            Phase(
                "short",
                steps=1000,
                seq_len=256,
                batch_size=24,
                learning_rate=3e-3,
                warmup_steps=100,
                **common,
            ),
            Phase(
                "middle",
                steps=800,
                seq_len=640,
                batch_size=12,
                learning_rate=3e-3,
                warmup_steps=20,
                **common,
            ),
            Phase(
                "long",
                steps=600,
                seq_len=1280,
                batch_size=6,
                learning_rate=2e-3,
                warmup_steps=20,
                schedule="linear",
                decay_to=0.02,
                **common,
            ),
        ),
        compile=True,
        log_every=20,
        save_every=200,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "dense-byte-3m": dense_byte_3m,
}
