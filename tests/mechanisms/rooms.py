"""The rooms side by side: what each reads, small numbers for 40 tokens, and where gradients go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from openmsa.mechanisms import dense, dsa, infllm2, moba, msa, nsa, window
from tests.support import seeded

H, G, D = 4, 2, 8
PER_KEY = ("k", "v", "k_index")  # all other tensors are read per query token, or are weights
WEIGHTS = ("k_weights", "v_weights")


@dataclass(frozen=True)
class Room:
    """call: (tensors by name, config, **how) -> an output. shapes: what is read beside q, k, v.

    everything: numbers and tensors at which nothing is left out. reach, taught: what `out` and
    `index_loss` have gradients for, in the phase "sparse".
    """

    module: object
    call: Callable
    small: object
    everything: object
    shapes: dict[str, tuple[int, ...]]
    reach: tuple[str, ...] = ("q", "k", "v")
    taught: tuple[str, ...] = ()
    open_gate: int | None = None


def _dense(x, config, *, phase="dense", **how):
    out, lse = dense.attend(x["q"], x["k"], x["v"], **how)
    return SimpleNamespace(out=out, lse=lse, index_loss=None, selection=None)


def _msa(x, config, **how):
    numbers = {name: getattr(config, name) for name in ("block_size", "top_k", "sink_blocks")}
    return msa.msa_attention(
        *(x[n] for n in ("q", "k", "v", "q_index", "k_index")), **numbers, **how
    )


def _nsa(x, config, **how):
    borders = {"cu_seqlens_k": how.get("cu_seqlens_k")}
    pairs = (("k", "k_weights"), ("v", "v_weights"))
    pooled = (nsa.compress(x[part], x[weights], config, **borders) for part, weights in pairs)
    return nsa.nsa_attention(x["q"], x["k"], x["v"], *pooled, x["gates"], config, **how)


def _dsa(x, config, **how):
    names = ("q", "k", "v", "q_index", "k_index", "head_weights")
    return dsa.dsa_attention(*(x[name] for name in names), config, **how)


def _plain(attention: Callable) -> Callable:
    return lambda x, config, **how: attention(x["q"], x["k"], x["v"], config, **how)


_WINDOW = {"module": window, "call": _plain(window.windowed_attention), "shapes": {}}
ROOMS = {
    "dense": Room(dense, _dense, None, dense.DenseConfig(), {}),
    "msa": Room(
        msa,
        _msa,
        msa.MSAConfig(block_size=4, top_k=3, sink_blocks=1),
        msa.MSAConfig(block_size=4, top_k=10),
        {"q_index": (G, D), "k_index": (D,)},
        taught=("q_index", "k_index"),
    ),
    "nsa": Room(
        nsa,
        _nsa,
        nsa.NSAConfig(kernel=4, stride=2, block_size=4, top_k=4, window=6),
        nsa.NSAConfig(kernel=4, stride=2, block_size=4, top_k=10, window=6),
        {"gates": (H, 3), "k_weights": (4, G, D), "v_weights": (4, G, D)},
        reach=("q", "k", "v", "gates", "k_weights", "v_weights"),
        open_gate=1,
    ),
    "nsa, its window": Room(
        nsa,
        _nsa,
        nsa.NSAConfig(kernel=8, stride=4, block_size=8, top_k=3, window=5),
        nsa.NSAConfig(kernel=4, stride=2, block_size=4, top_k=4, window=40),
        {"gates": (H, 3), "k_weights": (8, G, D), "v_weights": (8, G, D)},
        reach=("q", "k", "v", "gates", "k_weights", "v_weights"),
        open_gate=2,
    ),
    "moba": Room(
        moba,
        _plain(moba.moba_attention),
        moba.MoBAConfig(block_size=4, top_k=3),
        moba.MoBAConfig(block_size=4, top_k=10),
        {},
    ),
    "infllm2": Room(
        infllm2,
        _plain(infllm2.infllm2_attention),
        infllm2.InfLLM2Config(4, 2, 4, top_k=4, local_blocks=1, dense_below=0),
        infllm2.InfLLM2Config(4, 2, 4, top_k=10, local_blocks=1, dense_below=0),
        {},
    ),
    "dsa": Room(
        dsa,
        _dsa,
        dsa.DSAConfig(top_k=7, index_heads=3, d_index=D),
        dsa.DSAConfig(top_k=40, index_heads=3, d_index=D),
        {"q_index": (3, D), "k_index": (D,), "head_weights": (3,)},
        taught=("q_index", "k_index", "head_weights"),
    ),
    "window": Room(
        small=window.WindowConfig(window=7, sinks=2),
        everything=window.WindowConfig(window=40),
        **_WINDOW,
    ),
    "window with blocks": Room(
        small=window.WindowConfig(7, 2, global_blocks=1, random_blocks=2, block_size=4),
        everything=window.WindowConfig(7, random_blocks=10, block_size=4),
        **_WINDOW,
    ),
}
SPARSE = {name: room for name, room in ROOMS.items() if room.small is not None}


def tensors(
    room: Room, b: int, s: int, dtype: torch.dtype, *, grad: bool = False, config=None
) -> dict[str, Tensor]:
    """Seeded tensors of s tokens for one room, by name."""
    shapes = {"q": (H, D), "k": (G, D), "v": (G, D), **room.shapes}
    made = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if name in WEIGHTS:
            shape = (room.small if config is None else config).kernel, *shape[1:]
            made[name] = seeded(*shape, seed=seed, dtype=dtype)
        else:
            made[name] = seeded(b, s, *shape, seed=seed, dtype=dtype)
    if "gates" in made:
        made["gates"] = made["gates"].sigmoid()
    return {name: x.requires_grad_(grad) for name, x in made.items()}


def part(x: dict[str, Tensor], queries: slice, keys: slice, rows=slice(None)) -> dict[str, Tensor]:
    """Some queries, keys and rows of the batch."""
    return {
        name: y if name in WEIGHTS else y[rows, keys if name in PER_KEY else queries]
        for name, y in x.items()
    }


def with_one_gate(room: Room, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gates that let one branch through and no other, where there are gates."""
    if room.open_gate is None:
        return x
    gates = torch.zeros_like(x["gates"])
    gates[..., room.open_gate] = 1
    return {**x, "gates": gates}


def with_layers(config, layers):
    """The same numbers for some layers."""
    return replace(config, layers=layers)
