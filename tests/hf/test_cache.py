"""Index keys stay beside keys and values; appending writes a row; readers keep what they read."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import openmsa
from openmsa import hf
from openmsa.hf.cache import NAMES, MSACacheLayer
from tests.hf.tiny import CACHE, SPARSE, logits, tiny_model, tiny_tokens

B, G, D, DI = 3, 2, 4, 6


def new_rows(tokens: int, seed: int = 0, batch: int = B) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"keys": (batch, G, tokens, D), "values": (batch, G, tokens, D + 1)}
    shapes["index_keys"] = (batch, tokens, DI)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def append(layer: MSACacheLayer, rows: dict[str, torch.Tensor]) -> tuple:
    layer.stage(rows["index_keys"])
    keys, values = layer.update(rows["keys"], rows["values"])
    return keys, values, layer.take_index()


def filled(tokens: int = 7) -> tuple[MSACacheLayer, dict[str, torch.Tensor]]:
    layer, rows = MSACacheLayer(), new_rows(tokens)
    with torch.no_grad():
        append(layer, rows)
    return layer, rows


def assert_holds(layer: MSACacheLayer, rows: dict[str, torch.Tensor]) -> None:
    for name in NAMES:
        assert torch.equal(getattr(layer, name), rows[name]), name
    assert layer.get_seq_length() == rows["keys"].shape[-2]
    assert layer.get_mask_sizes(2) == (rows["keys"].shape[-2] + 2, 0)


def grown(rows: dict, more: dict) -> dict[str, torch.Tensor]:
    return {name: torch.cat([rows[name], more[name]], -2) for name in NAMES}


CHANGES = {
    "crop": (lambda layer: layer.crop(-3), lambda x: x[..., :-3, :]),
    "crop nothing": (lambda layer: layer.crop(0), lambda x: x),
    "crop everything": (lambda layer: layer.crop(-7), lambda x: x[..., :0, :]),
    "crop more than everything": (lambda layer: layer.crop(-70), lambda x: x[..., :0, :]),
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), lambda x: x[[2, 0, 0]]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([1])), lambda x: x[[1]]),
    "offload": (lambda layer: (layer.offload(), layer.prefetch()), lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("look", [False, True], ids=["unread", "read"])
def test_every_operation_takes_the_index_keys_along(change, look):
    layer, rows = filled()
    held = {name: getattr(layer, name) for name in NAMES} if look else {}
    snapshot = {name: x.clone() for name, x in held.items()}
    do, expected = CHANGES[change]
    do(layer)
    rows = {name: expected(x) for name, x in rows.items()}
    for step in range(3):
        more = new_rows(1 + step, seed=step + 1, batch=rows["keys"].shape[0])
        rows = grown(rows, more)
        with torch.no_grad():
            got = append(layer, more)
        assert all(torch.equal(x, rows[name]) for name, x in zip(NAMES, got, strict=True))
    assert_holds(layer, rows)
    assert all(torch.equal(held[name], x) for name, x in snapshot.items())


def test_reset_forgets_everything():
    layer, _ = filled()
    layer.reset()
    assert layer.get_seq_length() == 0
    rows = new_rows(4, seed=5)
    append(layer, rows)
    assert_holds(layer, rows)


def test_appending_a_token_writes_a_token():
    """What is there already stays where it is in memory, but for ever rarer growths."""
    layer, rows = MSACacheLayer(), new_rows(1)
    moves = []
    with torch.no_grad():
        for _ in range(2000):
            keys, _, index_keys = append(layer, rows)
            if not moves or (keys.data_ptr(), index_keys.data_ptr()) != moves[-1]:
                moves.append((keys.data_ptr(), index_keys.data_ptr()))
    assert len(moves) < 20


def test_rows_are_rewritten_in_place_after_a_crop_unless_somebody_read_them():
    layer, _ = filled()
    more = new_rows(1, seed=1)
    with torch.no_grad():
        first, _, _ = append(layer, more)
        layer.crop(-1)
        second, _, _ = append(layer, more)
        assert second.data_ptr() == first.data_ptr()
        held = layer.keys
        layer.crop(-1)
        third, _, _ = append(layer, more)
    assert third.data_ptr() != held.data_ptr()


def test_a_copy_shares_no_memory():
    layer, rows = filled()
    other = copy.deepcopy(layer)
    more, others = new_rows(2, seed=1), new_rows(2, seed=2)
    with torch.no_grad():
        append(other, others)
        append(layer, more)
    assert_holds(layer, grown(rows, more))
    assert_holds(other, grown(rows, others))


def test_a_graph_over_cached_rows_stays_valid():
    layer = MSACacheLayer()
    leaves = [
        {name: x.requires_grad_() for name, x in new_rows(2, seed=i).items()} for i in range(3)
    ]
    total = 0
    for rows in leaves:
        total = total + sum(x.square().sum() for x in append(layer, rows))
    total.backward()
    for step, rows in enumerate(leaves):
        for x in rows.values():
            torch.testing.assert_close(x.grad, 2 * x.detach() * (3 - step))
    with torch.no_grad():
        append(layer, new_rows(1, seed=9))
    assert layer.get_seq_length() == 7


def test_rows_of_inference_mode_can_be_continued_outside():
    layer = MSACacheLayer()
    with torch.inference_mode():
        rows = new_rows(3)
        append(layer, rows)
    more = new_rows(1, seed=1)
    with torch.no_grad():
        append(layer, more)
    assert_holds(layer, grown(rows, more))


def test_rows_that_do_not_fit_are_refused():
    layer, _ = filled()
    with pytest.raises(ValueError, match="only the number of tokens may differ"), torch.no_grad():
        append(layer, new_rows(1, batch=1))
    layer, _ = filled()
    rows = new_rows(1)
    with pytest.raises(ValueError, match="expects index keys"):
        layer.update(rows["keys"], rows["values"])
    with pytest.raises(ValueError, match="must be negative"):
        layer.crop(3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("chunks", [(1,) * 40, (17, 1, 1, 5, 1, 15), (40,)])
@pytest.mark.parametrize("kind", ["plain", "by config", "made by the model"])
def test_decoding_says_what_the_full_pass_says(family, chunks, kind):
    model, ids = hf.convert(tiny_model(family), SPARSE), tiny_tokens(2, 40)
    full = logits(model, ids)
    given = {"plain": DynamicCache(), "by config": DynamicCache(config=model.config)}
    cache, start, parts = given.get(kind), 0, []
    for size in chunks:
        with torch.no_grad():
            out = model(ids[:, start : start + size], use_cache=True, **{CACHE: cache})
        cache, start = out[CACHE], start + size
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=3e-5, rtol=1e-4)
    assert all(type(layer) is MSACacheLayer for layer in cache.layers)
    assert cache.layers[0].index_keys.shape == (2, 40, 16)


def test_layers_left_dense_keep_their_own_cache():
    config = openmsa.MSAConfig(block_size=4, top_k=3, layers=(1,))
    model, ids = hf.convert(tiny_model(), config), tiny_tokens(1, 40)
    cache = DynamicCache()
    with torch.no_grad():
        first = model(ids[:, :25], **{CACHE: cache}).logits
        rest = model(ids[:, 25:], **{CACHE: cache}).logits
    torch.testing.assert_close(
        torch.cat([first, rest], 1), logits(model, ids), atol=3e-5, rtol=1e-4
    )
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, MSACacheLayer, DynamicLayer]


def test_going_back_and_on_with_other_tokens():
    model, ids = hf.convert(tiny_model(), SPARSE), tiny_tokens(1, 44)
    other = torch.cat([ids[:, :30], tiny_tokens(1, 14, seed=1)], 1)
    cache = DynamicCache()
    logits(model, ids, **{CACHE: cache})
    cache.crop(-14)
    rest = logits(model, other[:, 30:], **{CACHE: cache})
    torch.testing.assert_close(rest, logits(model, other)[:, 30:], atol=3e-5, rtol=1e-4)


def test_caches_that_cannot_hold_index_keys_are_refused():
    dense, ids = tiny_model(), tiny_tokens(1, 20)
    model = hf.convert(copy.deepcopy(dense), SPARSE)
    filled = DynamicCache()
    logits(dense, ids, **{CACHE: filled})
    with pytest.raises(ValueError, match="holds 20 tokens but no index keys for layer 0"):
        logits(model, ids, **{CACHE: filled})
    with pytest.raises(ValueError, match="StaticLayer cannot hold; pass DynamicCache"):
        logits(model, ids, **{CACHE: StaticCache(config=model.config, max_cache_len=64)})
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(3)]
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer cannot hold"):
        logits(model, ids, **{CACHE: sliding})
    other = DynamicCache()
    other.layers = [type("Quantized", (DynamicLayer,), {})() for _ in range(3)]
    with pytest.raises(ValueError, match="DynamicCache with Quantized cannot hold"):
        logits(model, ids, **{CACHE: other})
    with pytest.raises(ValueError, match="needs a DynamicCache, got tuple"):
        logits(model, ids, **{CACHE: ((torch.zeros(1),),)})
    ours = DynamicCache()
    logits(model, ids, **{CACHE: ours})
    with pytest.raises(ValueError, match="give every model a cache of its own"):
        logits(dense, ids, **{CACHE: ours})
