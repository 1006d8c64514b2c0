"""What is made of whole windows is made once and stays right through everything a cache does."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from openmsa import hf
from openmsa.hf.cache import MSACacheLayer
from openmsa.hf.pooled_rows import PooledRows
from openmsa.hf.rooms import room_for
from openmsa.inference.timing import filled_cache
from tests.hf.mechanisms import SMALL, converted
from tests.hf.tiny import CACHE, logits, tiny_tokens

G, D = 2, 4
POOLING = ("moba", "infllm2", "nsa")
every_pooling = pytest.mark.parametrize("name", POOLING)


def weights_of(name: str) -> SimpleNamespace:
    """An attention module, as far as pooling reads it."""
    generator = torch.Generator().manual_seed(5)
    names = ("compress_k_weight", "compress_v_weight") if name == "nsa" else ()
    return SimpleNamespace(**{n: torch.randn(4, G, D, generator=generator) for n in names})


class Kept:
    """A layer of a cache, what its keys must be, and what must be kept of them."""

    def __init__(self, name: str, batch: int):
        self.room, self.attention = room_for(SMALL[name]), weights_of(name)
        self.layer, self.keys = MSACacheLayer(with_index=False), torch.empty(batch, 0, G, D)
        self.seed = 0

    def append(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        new = torch.randn(self.keys.shape[0], tokens, G, D, generator=generator)
        self.layer.update(new.transpose(1, 2), -new.transpose(1, 2))
        self.keys = torch.cat([self.keys, new], 1)

    def change(self, do, expected) -> None:
        do(self.layer)
        self.keys = expected(self.keys)

    def check(self, firsts: list[int] | None = None) -> None:
        """Rows begin at slot 0, or each at its own."""
        spans = [(slice(None), 0)]
        if firsts is not None:
            spans = [(slice(i, i + 1), first) for i, first in enumerate(firsts)]
        for rows, first in spans:
            k = self.keys[rows, first:]
            keys = {"k": k, "v": -k}
            made = self.layer.pooled(self.room, self.attention, keys, rows, first)
            expected = self.room.pool(self.attention, keys)
            assert set(made) == set(expected)
            for name, x in expected.items():
                torch.testing.assert_close(made[name], x, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@every_pooling
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_every_operation_keeps_what_pooling_anew_makes(name, padded):
    """Long random sequences of operations, looked at now and then."""
    for seed in range(12):
        draw, kept = random.Random(seed), Kept(name, 3)
        firsts = [draw.randrange(6) for _ in range(3)] if padded else None
        kept.append(draw.randrange(6, 12))
        for _ in range(25):
            what, batch = draw.randrange(9), kept.keys.shape[0]
            if what == 0:
                n = draw.randrange(min(7, kept.keys.shape[1] - 6) + 1)
                end = kept.keys.shape[1] - n
                kept.change(lambda layer, n=n: layer.crop(-n), lambda x, end=end: x[:, :end])
            elif what in (1, 2) and batch:
                order = torch.tensor([draw.randrange(batch) for _ in range(batch)])
                go = "reorder_cache" if what == 1 else "batch_select_indices"
                kept.change(
                    lambda layer, go=go, order=order: getattr(layer, go)(order),
                    lambda x, order=order: x[order],
                )
                firsts = firsts and [firsts[i] for i in order]
            elif what == 3 and batch < 9:
                kept.change(
                    lambda layer: layer.batch_repeat_interleave(2),
                    lambda x: x.repeat_interleave(2, 0),
                )
                firsts = firsts and [first for first in firsts for _ in range(2)]
            elif what == 4:
                kept.change(lambda layer: (layer.offload(), layer.prefetch()), lambda x: x)
            elif what == 5 and padded:
                firsts = [draw.randrange(6) for _ in firsts]
            elif what == 6:
                kept.layer = copy.deepcopy(kept.layer)
            else:
                kept.append(draw.randrange(1, 5))
            if draw.random() < 0.5:
                kept.check(firsts)
        kept.check(firsts)


@torch.no_grad()
@every_pooling
def test_a_window_is_pooled_once_and_stays_in_place(name, monkeypatch):
    kept, seen, places = Kept(name, 1), [], set()
    pool = type(kept.room).pool

    def counted(room, attention, keys):
        seen.append(keys["k"].shape[1])
        return pool(room, attention, keys)

    monkeypatch.setattr(type(kept.room), "pool", counted)
    kernel, stride = kept.room.windows
    for _ in range(900):
        kept.append(1)
        keys = {"k": kept.keys, "v": -kept.keys}
        made = kept.layer.pooled(kept.room, kept.attention, keys, slice(None), 0)
        places.add(next(iter(made.values())).data_ptr())
    assert seen[1:] == [kernel] * ((900 - kernel) // stride + 1)
    assert len(places) < 20


@torch.no_grad()
def test_other_numbers_dtypes_and_new_keys_begin_again():
    kept = Kept("moba", 2)
    kept.append(13)
    kept.check()
    kept.room, kept.attention = room_for(SMALL["infllm2"]), weights_of("infllm2")
    kept.check()
    new = torch.randn(2, G, 13, D)
    kept.change(lambda layer: setattr(layer, "keys", new), lambda _: new.transpose(1, 2))
    kept.check()
    kept.keys = kept.keys.double()
    kept.check()
    kept.layer.reset()
    kept.keys = torch.empty(1, 0, G, D)
    kept.append(9)
    kept.check()


@every_pooling
def test_rows_of_inference_mode_can_be_continued_outside(name):
    """Other batch rows with more windows keep theirs."""
    kept = Kept(name, 2)
    with torch.inference_mode():
        kept.append(30)
        kept.check([0, 20])
    with torch.no_grad():
        kept.append(3)
        k = kept.keys[1:, 20:]
        kept.layer.pooled(kept.room, kept.attention, {"k": k, "v": -k}, slice(1, 2), 20)
        kept.check([0, 20])


@every_pooling
def test_a_model_keeps_its_windows_and_goes_back_and_on_with_other_tokens(name, monkeypatch):
    """One pass, a crop into the middle of a window, chunks and single tokens."""
    model, ids = converted(name), tiny_tokens(2, 47)
    other = torch.cat([ids[:, :29], tiny_tokens(2, 18, seed=1)], 1)
    expected = logits(model, other)
    cache = DynamicCache()
    logits(model, ids, **{CACHE: cache})
    cache.crop(-18)
    cache.reorder_cache(torch.tensor([1, 0]))
    rest = [logits(model, other[[1, 0], 29:36], **{CACHE: cache})]
    cache.reorder_cache(torch.tensor([1, 0]))
    anew = PooledRows.of
    used = []
    monkeypatch.setattr(
        PooledRows, "of", lambda rows, *where: used.append(where[1:3]) or anew(rows, *where)
    )
    rest = [x[[1, 0]] for x in rest]
    rest += [logits(model, other[:, i : i + 1], **{CACHE: cache}) for i in range(36, 47)]
    torch.testing.assert_close(torch.cat(rest, 1), expected[:, 29:], atol=3e-5, rtol=1e-4)
    assert used == [(slice(None), 0)] * 33


@every_pooling
def test_with_gradients_windows_are_pooled_anew(name):
    model, ids, cache = converted(name), tiny_tokens(1, 24), DynamicCache()
    model(ids[:, :20], **{CACHE: cache})
    got = model(ids[:, 20:], **{CACHE: cache}).logits
    assert all(layer._pooled is None for layer in cache.layers)
    torch.testing.assert_close(got, logits(model, ids)[:, 20:], atol=3e-5, rtol=1e-4)
    got.square().sum().backward()
    if name == "nsa":
        weight = model.model.layers[0].self_attn.compress_v_weight
        assert weight.grad.abs().sum() > 0


def test_nothing_is_pooled_in_the_dense_phase(monkeypatch):
    model, ids = converted("nsa"), tiny_tokens(1, 30)
    hf.set_phase(model, "dense")
    expected = logits(model, ids)
    monkeypatch.setattr("openmsa.hf.rooms.nsa.compress", None)
    cache = DynamicCache()
    got = [logits(model, part, **{CACHE: cache}) for part in ids.split(25, 1)]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=3e-5, rtol=1e-4)
    assert all(layer._pooled is None for layer in cache.layers)


@every_pooling
def test_captured_calls_hold_tokens_only(name):
    model, ids, cache = converted(name), tiny_tokens(1, 31), DynamicCache()
    logits(model, ids[:, :30], **{CACHE: cache})
    with hf.capture_attention(model) as calls:
        logits(model, ids[:, 30:], **{CACHE: cache})
    assert set(calls[0].others) == ({"gates"} if name == "nsa" else set())


@torch.no_grad()
@every_pooling
def test_a_cache_filled_for_timing_is_pooled_over_all_its_tokens(name):
    model = converted(name)
    cache = filled_cache(model, 150)
    model(tiny_tokens(1, 1), **{CACHE: cache})
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        keys = {"k": layer.keys.transpose(1, 2), "v": layer.values.transpose(1, 2)}
        room, attention = block.self_attn.msa_room, block.self_attn
        held = layer._pooled.of(keys, slice(None), 0, None)
        for part, x in room.pool(attention, keys).items():
            torch.testing.assert_close(held[part], x, atol=1e-6, rtol=1e-6)
