"""Every mechanism has the same headings in the same order and obeys the same laws."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

from openmsa import mechanisms
from tests.support import every_backend, index_qk, qkv, widest

ROOMS = sorted(m.name for m in pkgutil.iter_modules(mechanisms.__path__))
HEADINGS = ("Config", "REMEMBERS", "select", "attend", "loss")

every_room = pytest.mark.parametrize("room", ROOMS)


def load(room):
    return importlib.import_module(f"openmsa.mechanisms.{room}")


def config_of(module):
    (found,) = [
        x for name, x in vars(module).items() if name.endswith("Config") and inspect.isclass(x)
    ]
    return found


def attend(room, tensors, backend, keep=3):
    """Select and attend with blocks of 4, whatever the mechanism selects by."""
    module = load(room)
    q, k, v, q_index, k_index = tensors
    config = config_of(module)
    if room == "dense":
        return module.attend(q, k, v, module.select(config()), backend=backend)[0]
    chosen = module.select(config(block_size=4, top_k=keep), q_index, k_index, backend=backend)
    return module.attend(q, k, v, chosen, backend=backend)[0]


def tensors(t, s, dtype):
    return (*qkv(2, t, s, 4, 2, 8, dtype=dtype), *index_qk(2, t, s, 2, 8, dtype=dtype))


@every_room
def test_headings_come_in_order(room):
    lines = inspect.getsource(load(room)).splitlines()
    places = []
    for heading in HEADINGS:
        starts = {
            "Config": lambda line: line.startswith("class ") and "Config" in line,
            "REMEMBERS": lambda line: line.startswith("REMEMBERS ="),
        }.get(heading, lambda line, heading=heading: line.startswith(f"def {heading}("))
        places.append(next(i for i, line in enumerate(lines) if starts(line)))
    assert places == sorted(places)
    assert "arXiv" in load(room).__doc__


@every_room
@every_backend
@pytest.mark.parametrize("s", [1, 15, 16, 17, 40])
def test_keeping_everything_is_dense(room, backend, s):
    x = tensors(s, s, widest(backend))
    torch.testing.assert_close(attend(room, x, backend, keep=10), attend("dense", x, "reference"))


@every_room
@every_backend
def test_future_cannot_be_read(room, backend):
    x = tensors(40, 40, widest(backend))
    changed = [y.clone() for y in x]
    for y in changed:
        y[:, 29:] = float("nan")
    before, after = (attend(room, y, backend)[:, :29] for y in (x, changed))
    torch.testing.assert_close(before, after)


@every_room
@every_backend
def test_decoding_is_the_full_pass(room, backend):
    x = tensors(40, 40, widest(backend))
    full = attend(room, x, backend)
    q, k, v, q_index, k_index = x
    for start, end in ((0, 1), (4, 5), (13, 20), (39, 40)):
        step = (q[:, start:end], k[:, :end], v[:, :end], q_index[:, start:end], k_index[:, :end])
        torch.testing.assert_close(attend(room, step, backend), full[:, start:end])
