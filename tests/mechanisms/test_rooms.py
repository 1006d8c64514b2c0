"""Every mechanism has the same headings in the same order and obeys the same laws."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

from openmsa import dense_attention, mechanisms
from tests.mechanisms.rooms import (
    PER_KEY,
    ROOMS,
    SPARSE,
    WEIGHTS,
    part,
    tensors,
    with_layers,
    with_one_gate,
)
from tests.support import borders, every_backend, seeded, widest

MODULES = sorted(m.name for m in pkgutil.iter_modules(mechanisms.__path__))
HEADINGS = ("Config", "REMEMBERS", "select", "attend", "loss")

every_room = pytest.mark.parametrize("name", ROOMS)
every_sparse_room = pytest.mark.parametrize("name", SPARSE)


def close(ours, expected):
    """fp64 to its usual tolerance, fp32 to what tiles summed in another order differ by."""
    wide = ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, **({} if wide else {"atol": 2e-5, "rtol": 1e-4}))


def load(module: str):
    return importlib.import_module(f"openmsa.mechanisms.{module}")


def test_every_mechanism_is_in_the_table():
    assert {room.module.__name__.rpartition(".")[2] for room in ROOMS.values()} == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_headings_come_in_order(module):
    lines = inspect.getsource(load(module)).splitlines()
    places = []
    for heading in HEADINGS:
        starts = {
            "Config": lambda line: line.startswith("class ") and "Config" in line,
            "REMEMBERS": lambda line: line.startswith("REMEMBERS ="),
        }.get(heading, lambda line, heading=heading: line.startswith(f"def {heading}("))
        places.append(next(i for i, line in enumerate(lines) if starts(line)))
    assert places == sorted(places)
    assert "arXiv" in load(module).__doc__


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("dense", "msa")])
def test_the_header_says_what_is_scored_shared_trained_and_kept(module):
    header = " ".join(load(module).__doc__.split())
    for word in ("Scored:", "Shared:", "Trained by:", "Remembered:"):
        assert word in header, word


@every_sparse_room
def test_what_is_remembered_is_what_is_read_per_key(name):
    room = ROOMS[name]
    read = {n for n in ("k", "v", *room.shapes) if n in PER_KEY}
    assert set(room.module.REMEMBERS) == read


@every_room
@every_backend
@pytest.mark.parametrize("s", [1, 15, 16, 17, 40])
def test_keeping_everything_is_dense(name, backend, s):
    room, dtype = ROOMS[name], widest(backend)
    x = with_one_gate(room, tensors(room, 2, s, dtype, config=room.everything))
    expected = dense_attention(x["q"], x["k"], x["v"], backend="reference")
    close(room.call(x, room.everything, backend=backend).out, expected)


@every_sparse_room
@every_backend
def test_small_numbers_are_not_dense_and_the_dense_phase_is(name, backend):
    room = ROOMS[name]
    x = tensors(room, 2, 40, widest(backend))
    expected = dense_attention(x["q"], x["k"], x["v"], backend="reference")
    made = room.call(x, room.small, backend=backend, phase="dense")
    close(made.out, expected)
    assert made.selection is None and made.index_loss is None
    sparse = room.call(x, room.small, backend=backend).out
    assert (sparse[:, 20:] - expected[:, 20:]).abs().amax((2, 3)).min() > 1e-3


@every_room
@every_backend
def test_future_cannot_be_read(name, backend):
    room = ROOMS[name]
    x = tensors(room, 2, 40, widest(backend))
    changed = {n: y.clone() for n, y in x.items()}
    for n, y in changed.items():
        if n not in WEIGHTS:
            y[:, 29:] = float("nan")
    before, after = (room.call(y, room.small, backend=backend).out[:, :29] for y in (x, changed))
    close(after, before)


@every_room
@every_backend
def test_decoding_is_the_full_pass(name, backend):
    room = ROOMS[name]
    x = tensors(room, 2, 40, widest(backend))
    full = room.call(x, room.small, backend=backend).out
    for start, end in ((0, 1), (4, 5), (13, 20), (39, 40)):
        step = room.call(part(x, slice(start, end), slice(end)), room.small, backend=backend)
        close(step.out, full[:, start:end])


@every_room
@every_backend
def test_permuting_a_batch_permutes_the_result(name, backend):
    room, order = ROOMS[name], torch.tensor([2, 0, 1])
    x = tensors(room, 3, 23, widest(backend))
    expected = room.call(x, room.small, backend=backend).out[order]
    shuffled = part(x, slice(None), slice(None), order)
    assert torch.equal(room.call(shuffled, room.small, backend=backend).out, expected)


@every_room
@every_backend
@pytest.mark.parametrize("last", [False, True], ids=["whole", "last queries"])
def test_packed_sequences_are_each_alone(name, backend, last):
    """Odd lengths, one token, none; or only the last queries of each, as when decoding."""
    room, keys = ROOMS[name], (17, 1, 0, 40, 6)
    asked = (3, 1, 0, 5, 6) if last else keys
    x = tensors(room, 1, sum(keys), widest(backend))
    starts = borders(*keys).tolist()
    where = [slice(end - n, end) for end, n in zip(starts[1:], asked, strict=True)]
    rows = torch.cat([torch.arange(sum(keys))[place] for place in where])
    packed = room.call(
        part(x, rows, slice(None)),
        room.small,
        backend=backend,
        cu_seqlens_q=borders(*asked),
        cu_seqlens_k=borders(*keys),
    ).out
    for made, place, start, n in zip(packed.split(asked, 1), where, starts, keys, strict=False):
        if made.shape[1]:
            alone = part(x, place, slice(start, start + n))
            close(made, room.call(alone, room.small, backend=backend).out)


@every_sparse_room
@pytest.mark.parametrize("backend", ["reference", "portable", "cpu-portable"], indirect=True)
@pytest.mark.parametrize("phase", ["dense", "warmup", "sparse"])
def test_gradients_reach_what_the_header_says_and_nothing_else(name, backend, phase):
    room = ROOMS[name]
    if phase not in room.module.PHASES:
        with pytest.raises(ValueError, match="phase must be one of dense, sparse, got 'warmup'"):
            room.call(tensors(room, 1, 9, widest(backend)), room.small, phase=phase)
        return
    x = tensors(room, 2, 40, widest(backend), grad=True)
    made = room.call(x, room.small, phase=phase, backend=backend)
    weights = seeded(*made.out.shape, seed=30, dtype=made.out.dtype)
    found = torch.autograd.grad(
        (made.out * weights).sum(), list(x.values()), allow_unused=True, retain_graph=True
    )
    reached = {n for n, grad in zip(x, found, strict=True) if grad is not None and grad.any()}
    assert reached == set(room.reach if phase == "sparse" else ("q", "k", "v"))
    assert (made.index_loss is not None) == bool(room.taught and phase != "dense")
    if made.index_loss is not None:
        found = torch.autograd.grad(made.index_loss, list(x.values()), allow_unused=True)
        taught = {n for n, grad in zip(x, found, strict=True) if grad is not None and grad.any()}
        assert taught == set(room.taught)


@every_sparse_room
def test_layers_are_chosen_alike(name):
    config = ROOMS[name].small
    assert with_layers(config, [3, 1]).layers == (1, 3)
    for layers, message in (((1, 1), "once"), (3, "layers must be"), ((0, -1), "layers must be")):
        with pytest.raises(ValueError, match=message):
            with_layers(config, layers)
