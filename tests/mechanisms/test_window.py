"""The window as a whole: its phases, the pattern of its blocks, and its config."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from openmsa import dense_attention
from openmsa.mechanisms.window import WindowConfig, select, windowed_attention
from openmsa.ops.window_attention import window_attention
from tests.support import borders, eager_attention, qkv, seeded

BLOCKS = WindowConfig(window=9, sinks=3, global_blocks=2, random_blocks=2, block_size=4, seed=5)


def pattern(config, t=83, s=83, g=2, **where):
    return select(config, *qkv(1, t, s, 2 * g, g, 4)[:2], **where).blocks[0]


def test_without_global_and_random_blocks_it_is_exact_to_the_token():
    q, k, v = qkv(2, 40, 50, 4, 2, 8, dtype=torch.float64)
    made = windowed_attention(q, k, v, WindowConfig(window=9, sinks=3), scale=0.5)
    out, lse = window_attention(q, k, v, window=9, sinks=3, scale=0.5, return_lse=True)
    assert made.selection is None and made.index_loss is None
    assert torch.equal(made.out, out) and torch.equal(made.lse, lse)


def test_the_window_is_that_of_transformers():
    masks = pytest.importorskip("transformers.masking_utils")
    read = masks.sliding_window_causal_mask_function(9)
    place = torch.arange(40)
    read = read(0, 0, place[:, None], place)
    q, k, v = qkv(1, 40, 40, 4, 2, 8, dtype=torch.float64)
    made = windowed_attention(q, k, v, WindowConfig(window=9, sinks=0))
    torch.testing.assert_close(made.out, eager_attention(q, k, v, read[None, None], 8**-0.5))


@pytest.mark.parametrize("config", [WindowConfig(window=9, sinks=3), BLOCKS])
def test_dense_phase(config):
    q, k, v = qkv(2, 40, 40, 4, 2, 8)
    made = windowed_attention(q, k, v, config, phase="dense")
    out, lse = dense_attention(q, k, v, return_lse=True)
    assert torch.equal(made.out, out) and torch.equal(made.lse, lse)
    assert made.selection is None


def test_blocks_are_first_latest_and_some_between():
    for position, row in enumerate(pattern(BLOCKS)[0].tolist()):
        own = position // 4
        kept = [x for x in row if x >= 0]
        assert row == sorted(set(kept)) + [-1] * (7 - len(kept))
        sure = {x for x in (0, 1, own - 2, own - 1, own) if 0 <= x <= own}
        between = [x for x in kept if x not in sure]
        assert sure <= set(kept)
        assert len(between) == min(2, max(0, own - 4))
        assert all(2 <= x < own - 2 for x in between)


def test_attention_over_blocks_from_the_definition():
    q, k, v = qkv(1, 83, 83, 4, 2, 8, dtype=torch.float64, grad=True)
    made = windowed_attention(q, k, v, BLOCKS)
    place = torch.arange(83)
    read = (made.selection.blocks[..., None] == place // 4).any(-2) & (place <= place[:, None])
    truth = eager_attention(q, k, v, read, 8**-0.5)
    torch.testing.assert_close(made.out, truth)
    dout = seeded(1, 83, 4, 8, seed=3, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (made.out, truth))):
        torch.testing.assert_close(a, b)


def test_draws_depend_on_seed_group_and_query_block_only():
    blocks = pattern(BLOCKS)
    assert torch.equal(blocks, pattern(BLOCKS))
    assert not torch.equal(blocks, pattern(dataclasses.replace(BLOCKS, seed=6)))
    assert not torch.equal(blocks[0], blocks[1])
    assert torch.equal(pattern(BLOCKS, t=1, s=70)[:, 0], blocks[:, 69])
    assert torch.equal(blocks[:, 48], blocks[:, 51])


def test_draws_cover_what_lies_between():
    config = dataclasses.replace(BLOCKS, random_blocks=1, window=1, global_blocks=1)
    blocks = pattern(config, t=1, s=4 * 34, g=512)[:, 0, 1]
    counts = torch.bincount(blocks, minlength=33)[1:33]
    assert len(counts) == 32 and counts.sum() == 512
    assert counts.min() >= 5 and counts.max() <= 32  # 16 each on average, 4 standard deviations


@pytest.mark.parametrize("config", [WindowConfig(window=9, sinks=3), BLOCKS])
def test_packed_equals_alone_and_decoding_the_full_pass(config):
    tq, sk = (30, 1, 20), (30, 33, 41)
    q, k, v = qkv(1, sum(tq), sum(sk), 4, 2, 8, dtype=torch.float64)
    where = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    packed = windowed_attention(q, k, v, config, **where)
    alone = [
        windowed_attention(*x, config).out
        for x in zip(q.split(tq, 1), k.split(sk, 1), v.split(sk, 1))
    ]
    torch.testing.assert_close(packed.out, torch.cat(alone, 1))
    q, k, v = qkv(2, 60, 60, 4, 2, 8, dtype=torch.float64)
    full = windowed_attention(q, k, v, config)
    for start, end in ((0, 1), (4, 5), (59, 60), (13, 50)):
        step = windowed_attention(q[:, start:end], k[:, :end], v[:, :end], config)
        torch.testing.assert_close(step.out, full.out[:, start:end])


def test_config_is_frozen_and_says_how_many_blocks():
    config = WindowConfig()
    assert (config.window, config.sinks, config.global_blocks, config.random_blocks) == (
        (512, 4, 0, 0)
    )
    assert (config.first_blocks, config.local_blocks) == (1, 8)
    assert (BLOCKS.first_blocks, BLOCKS.local_blocks) == (2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 8
    assert WindowConfig(layers=[3, 1]).layers == (1, 3)
    assert WindowConfig(**dataclasses.asdict(BLOCKS)) == BLOCKS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"block_size": 0}, "block_size must be"),
        ({"sinks": -1}, "sinks must be a whole number of at least 0"),
        ({"global_blocks": 1.5}, "global_blocks must be"),
        ({"random_blocks": "2"}, "random_blocks must be"),
        ({"seed": -1}, "seed must be"),
        ({"layers": (1, 1)}, "name each layer once"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        WindowConfig(**fields)


@pytest.mark.parametrize("config", [WindowConfig(), BLOCKS])
def test_refuses_what_does_not_fit(config):
    q, k, v = qkv(1, 6, 6, 4, 2, 8)
    with pytest.raises(ValueError, match="phase must be one of dense, sparse, got 'warmup'"):
        windowed_attention(q, k, v, config, phase="warmup")
    with pytest.raises(ValueError, match="6 query tokens cannot be the last of 5"):
        windowed_attention(q, k[:, :5], v[:, :5], config)
