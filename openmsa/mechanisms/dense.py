"""Dense grouped-query attention (arXiv 2305.13245), the baseline of every comparison.

O[t, h] = softmax over every visible s of (q[t, h] . k[s, g] / sqrt(d)) @ v[s, g],   g = h // r

Scored: every visible key, by the attention itself. Shared: keys and values, by the heads of a
group. Trained by: the model's own loss. Remembered: k and v.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openmsa.ops.dense_attention import dense_attention


@dataclass(frozen=True)
class DenseConfig:
    """Dense attention has no numbers of its own."""


REMEMBERS = ("k", "v")


def select(config: DenseConfig) -> None:
    """Every visible key: nothing to choose, so no Selection."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: None = None, *, scale: float | None = None, **where
) -> tuple[Tensor, Tensor]:
    """q [b, t, h, d], k [b, s, g, d], v [b, s, g, d_value] -> out [b, t, h, d_value], lse

    where: cu_seqlens_q, cu_seqlens_k and backend, as in `dense_attention`.
    """
    return dense_attention(q, k, v, scale=scale, return_lse=True, **where)


def loss() -> None:
    """Nothing is selected, so nothing has to be taught."""
