"""MSA as a whole: phases, where gradients go, and its config."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from openmsa import (
    MSAConfig,
    Selection,
    dense_attention,
    index_loss,
    msa_attention,
    select_blocks,
    sparse_attention,
)
from tests.support import every_backend, index_qk, qkv, widest

RULE = {"block_size": 4, "top_k": 3}


def tensors(backend, b=2, t=30, s=30):
    dtype = widest(backend)
    return (
        *qkv(b, t, s, 4, 2, 8, dtype=dtype, grad=True),
        *index_qk(b, t, s, 2, 8, dtype=dtype, grad=True),
    )


@every_backend
def test_sparse_phase_is_select_attend_and_loss(backend):
    q, k, v, q_index, k_index = tensors(backend)
    made = msa_attention(q, k, v, q_index, k_index, **RULE, backend=backend, scale=0.5)
    selection = select_blocks(q_index, k_index, **RULE)
    out, lse = sparse_attention(q, k, v, selection, scale=0.5, return_lse=True)
    assert torch.equal(made.selection.blocks, selection.blocks)
    torch.testing.assert_close(made.out, out)
    torch.testing.assert_close(made.lse, lse)
    loss = index_loss(q, k, q_index, k_index, selection, scale=0.5)
    torch.testing.assert_close(made.index_loss, loss)


@every_backend
def test_warmup_attends_densely_and_teaches_on_the_prefix(backend):
    q, k, v, q_index, k_index = tensors(backend)
    made = msa_attention(q, k, v, q_index, k_index, **RULE, phase="warmup", backend=backend)
    assert made.selection is None
    torch.testing.assert_close(made.out, dense_attention(q, k, v))
    torch.testing.assert_close(made.index_loss, index_loss(q, k, q_index, k_index))


@every_backend
def test_dense_phase_leaves_the_index_alone(backend):
    q, k, v, q_index, k_index = tensors(backend)
    made = msa_attention(q, k, v, q_index, k_index, **RULE, phase="dense", backend=backend)
    assert made.index_loss is None
    assert made.selection is None
    torch.testing.assert_close(made.out, dense_attention(q, k, v))


@every_backend
@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_loss_and_output_keep_their_gradients_apart(backend, phase):
    inputs = tensors(backend)
    made = msa_attention(*inputs, **RULE, phase=phase, backend=backend)
    from_out = torch.autograd.grad(made.out.sum(), inputs, allow_unused=True, retain_graph=True)
    from_loss = torch.autograd.grad(made.index_loss, inputs, allow_unused=True)
    assert [x is not None for x in from_out] == [True, True, True, False, False]
    assert [x is not None for x in from_loss] == [False, False, False, True, True]


@every_backend
def test_loss_is_left_out_on_request(backend):
    made = msa_attention(*tensors(backend), **RULE, with_index_loss=False, backend=backend)
    assert made.index_loss is None
    assert isinstance(made.selection, Selection)


@every_backend
def test_keeping_every_block_equals_the_dense_phase(backend):
    inputs = tensors(backend)
    kept = msa_attention(*inputs, block_size=4, top_k=8, backend=backend)
    dense = msa_attention(*inputs, phase="warmup", backend=backend)
    torch.testing.assert_close(kept.out, dense.out)
    torch.testing.assert_close(kept.index_loss, dense.index_loss)


@every_backend
def test_decoding_equals_the_full_pass(backend):
    q, k, v, q_index, k_index = tensors(backend)
    full = msa_attention(q, k, v, q_index, k_index, **RULE, backend=backend)
    for end in (1, 4, 5, 29, 30):
        here = slice(end - 1, end)
        step = msa_attention(
            *(q[:, here], k[:, :end], v[:, :end], q_index[:, here], k_index[:, :end]),
            **RULE,
            backend=backend,
        )
        torch.testing.assert_close(step.out, full.out[:, here])


@every_backend
def test_short_sequences_are_dense_and_long_ones_are_not(backend):
    """A test shorter than k blocks could not see a wrong selection."""
    q, k, v, q_index, k_index = tensors(backend)
    made = msa_attention(q, k, v, q_index, k_index, **RULE, backend=backend)
    dense = dense_attention(q, k, v)
    torch.testing.assert_close(made.out[:, :12], dense[:, :12])
    assert (made.out[:, 12:] - dense[:, 12:]).abs().amax((0, 2, 3)).min() > 1e-3


def test_config_is_the_papers_by_default_and_frozen():
    config = MSAConfig()
    assert (config.block_size, config.top_k, config.local_blocks, config.sink_blocks) == (
        (128, 16, 1, 0)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 8
    assert MSAConfig(layers=[3, 1]).layers == (1, 3)
    assert MSAConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
        ({"block_size": 1.5}, "block_size must be a whole number"),
        ({"top_k": 0}, "top_k must be"),
        ({"local_blocks": -1}, "local_blocks must be"),
        ({"sink_blocks": "2"}, "sink_blocks must be"),
        ({"d_index": 0}, "d_index must be"),
        ({"top_k": 2, "local_blocks": 2, "sink_blocks": 1}, "top_k=2 cannot hold"),
        ({"layers": (0, -1)}, "layers must be a whole number"),
        ({"layers": (1, 1)}, "name each layer once"),
        ({"layers": 3}, "layers must be a list"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        MSAConfig(**fields)


def test_defaults_agree_everywhere():
    """msa_attention, select_blocks and MSAConfig say the same numbers."""
    config = MSAConfig()
    for call in (msa_attention, select_blocks):
        defaults = inspect.signature(call).parameters
        for name in ("block_size", "top_k", "local_blocks", "sink_blocks"):
            assert defaults[name].default == getattr(config, name)
