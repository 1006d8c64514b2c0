"""Recall of the index: the paper's definitions, by hand, by brute force and on real models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import openmsa
from openmsa import hf
from openmsa.evaluation.captures import as_mask, run_and_look
from openmsa.evaluation.recall import (
    MEASURES,
    block_mass,
    call_recall,
    evaluate_recall,
    oracle_blocks,
    probe,
)
from tests.hf.tiny import tiny_model

CONFIG = openmsa.MSAConfig(block_size=4, top_k=3)


def call_of(q, k, q_index, k_index, *, scale=1.0, borders=None, selection=None):
    return hf.AttentionCall(
        layer=5,
        q=q,
        k=k,
        v=k,
        q_index=q_index,
        k_index=k_index,
        selection=selection,
        scale=scale,
        index_scale=1.0,
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
    )


def random_call(b, t, s, h, g, seed=0, borders=None):
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(b, n, m, 6, generator=draw) for n, m in ((t, h), (s, g)))
    q_index = torch.randn(b, t, g, 5, generator=draw)
    return call_of(q, k, q_index, torch.randn(b, s, 5, generator=draw), borders=borders)


def brute_force(call, config):
    """The four measures, query by query, in fp64 and plain loops; means over queries per group."""
    kept = []
    t, (s, g) = call.q.shape[1], call.k.shape[1:3]
    for row in range(call.q.shape[0]):
        for i in range(t):
            position = s - t + i
            own = position // config.block_size
            if own + 1 <= config.top_k:
                continue
            kept.append([_one(call, config, row, i, group, position, own) for group in range(g)])
    return torch.tensor(kept, dtype=torch.float64).mean(0)  # [g, 4]


def _one(call, config, row, i, group, position, own):
    r = call.q.shape[2] // call.k.shape[2]
    keys = call.k[row, : position + 1, group].double()
    heads = call.q[row, i, group * r : (group + 1) * r].double()
    p = (heads @ keys.T * call.scale).softmax(-1).mean(0)
    worth = call.k_index[row, : position + 1].double() @ call.q_index[row, i, group].double()
    size = config.block_size
    mass = [float(p[n * size : (n + 1) * size].sum()) for n in range(own + 1)]
    best = [float(worth[n * size : (n + 1) * size].max()) for n in range(own + 1)]
    forced = [n for n in range(own + 1) if n < config.sink_blocks or n > own - config.local_blocks]

    def top(values):
        others = sorted((n for n in range(own + 1) if n not in forced), key=lambda n: -values[n])
        return set((forced + others)[: config.top_k])

    oracle, chosen = top(mass), top(best)
    total = sum(mass[n] for n in oracle)
    hit = oracle & chosen
    found = sum(mass[n] for n in hit)
    return [len(hit) / len(oracle), found / total, sum(mass[n] for n in chosen), total]


def as_tensor(recall):
    rows = [getattr(recall, name) for name in MEASURES]
    return torch.tensor(rows, dtype=torch.float64).T


def test_the_papers_worked_vector():
    """Paper notes, 2.8: block recall .50, score recall .702, captured mass .695."""
    heads = torch.tensor(
        [
            [0.02, 0.03, 0.10, 0.05, 0.30, 0.20, 0.15, 0.15],
            [0.04, 0.02, 0.04, 0.02, 0.40, 0.28, 0.10, 0.10],
        ]
    )
    scores = torch.tensor([-1.2, -0.8, 1.4, -0.3, 2.1, 1.5, 0.9, 1.1])
    call = call_of(
        heads.log()[None, None],
        torch.eye(8)[None, :, None],
        torch.ones(1, 1, 1, 1),
        scores[None, :, None],
    )
    recall = call_recall(call, openmsa.MSAConfig(block_size=2, top_k=2, local_blocks=0))
    assert recall.queries == 1 and recall.layer == 5
    assert recall.block_recall == (0.5,)
    assert recall.score_recall[0] == pytest.approx(0.59 / 0.84, abs=1e-6)
    assert recall.captured_mass[0] == pytest.approx(0.695, abs=1e-6)
    assert recall.oracle_mass[0] == pytest.approx(0.84, abs=1e-6)


@pytest.mark.parametrize("forced", [(1, 0), (0, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize(("t", "s"), [(17, 17), (5, 23), (1, 14)])
def test_measures_equal_brute_force(t, s, forced):
    local, sink = forced
    config = openmsa.MSAConfig(block_size=4, top_k=3, local_blocks=local, sink_blocks=sink)
    call = random_call(2, t, s, 6, 2)
    torch.testing.assert_close(as_tensor(call_recall(call, config)), brute_force(call, config))


def test_packed_sequences_are_measured_each_alone():
    lengths = (19, 3, 26)
    parts = [random_call(1, n, n, 4, 2, seed=n) for n in lengths]
    borders = torch.tensor([0, 19, 22, 48], dtype=torch.int32)
    names = ("q", "k", "q_index", "k_index")
    joined = [torch.cat([getattr(p, n) for p in parts], dim=1) for n in names]
    together = call_recall(call_of(*joined, borders=borders), CONFIG)
    alone = [call_recall(part, CONFIG) for part in parts]
    assert alone[1] is None, "three tokens fit the budget"
    counted = [a for a in alone if a is not None]
    mean = sum(a.queries * as_tensor(a) for a in counted) / sum(a.queries for a in counted)
    assert together.queries == 7 + 14
    torch.testing.assert_close(as_tensor(together), mean)


def test_an_index_that_is_the_attention_finds_everything():
    """One head per group and blocks of one token: ranking by score is ranking by mass."""
    draw = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 30, 1, 6, generator=draw) for _ in range(2))
    call = call_of(q, k, q, k[:, :, 0])
    recall = call_recall(call, openmsa.MSAConfig(block_size=1, top_k=4))
    assert recall.block_recall == (1.0,) and recall.score_recall[0] == pytest.approx(1.0)
    assert recall.captured_mass == recall.oracle_mass


def test_a_bad_index_is_caught():
    """The index ranks blocks in the reverse order of their mass: only the forced block is found."""
    draw = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 64, 1, 6, generator=draw) for _ in range(2))
    config = openmsa.MSAConfig(block_size=1, top_k=4)
    bad = call_recall(call_of(2 * q, k, -q, k[:, :, 0]), config)
    assert bad.block_recall[0] < 0.45 and bad.score_recall[0] < 0.35
    assert bad.captured_mass[0] < 0.5 * bad.oracle_mass[0]


def test_an_own_selection_of_the_call_is_believed():
    call = random_call(1, 20, 20, 4, 2)
    blocks = torch.tensor([0, 1, 4], dtype=torch.int32).expand(1, 2, 20, 3)
    told = call_of(
        call.q,
        call.k,
        call.q_index,
        call.k_index,
        selection=openmsa.Selection(blocks.contiguous(), 4),
    )
    mass = block_mass(call.q[0], call.k[0], torch.arange(12, 20), scale=1.0, block_size=4)
    expected = mass[:, :, [0, 1, 4]].sum(-1).mean(0)
    captured = torch.tensor(call_recall(told, CONFIG).captured_mass)
    torch.testing.assert_close(captured, expected)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_nothing_beats_the_oracle_and_recall_is_a_share(seed):
    one_query = random_call(1, 1, 21, 4, 2, seed=seed)  # of means, the third line would not hold
    recall = as_tensor(call_recall(one_query, CONFIG))
    block, score, captured, oracle = recall.unbind(1)
    assert (captured <= oracle + 1e-6).all() and (oracle <= 1 + 1e-6).all()
    assert (score * oracle <= captured + 1e-6).all()
    assert ((block > 0) & (block <= 1)).all()


def test_chunks_of_queries_change_nothing(monkeypatch):
    call = random_call(1, 33, 40, 4, 2)
    rows = torch.tensor([0, 7, 8, 30, 32])
    whole = block_mass(call.q[0], call.k[0], rows, scale=0.3, block_size=4)
    monkeypatch.setattr("openmsa.evaluation.recall.SCORE_BYTES", 1)
    parts = block_mass(call.q[0], call.k[0], rows, scale=0.3, block_size=4)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole.sum(-1), torch.ones(5, 2))


def test_equal_masses_go_to_the_lower_block():
    mass = torch.full((1, 1, 6), 1 / 6)
    kept = oracle_blocks(mass, torch.tensor([11]), block_size=2, top_k=3)
    assert kept.nonzero()[:, -1].tolist() == [0, 1, 5]


def test_empty_slots_select_nothing():
    mask = as_mask(torch.tensor([[0, 2, -1], [-1, -1, -1]], dtype=torch.int32), 3)
    assert mask.tolist() == [[True, False, True], [False, False, False]]


def converted(phase: str, init: str = "main"):
    model = hf.convert(tiny_model("qwen3"), CONFIG, init=init)
    hf.set_phase(model, phase)
    return model


def ids(n: int, t: int) -> torch.Tensor:
    return torch.randint(3, 50, (n, t), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("phase", ["dense", "warmup", "sparse"])
def test_a_model_is_measured_in_its_phase(phase):
    model, read = converted(phase), ids(2, 40)
    recall = evaluate_recall(model, read)
    assert [layer.layer for layer in recall.layers] == hf.msa_layers(model)
    assert all(layer.queries == 2 * (40 - 12) for layer in recall.layers)
    with hf.capture_attention(model) as calls, torch.no_grad():
        model.eval()(input_ids=read, use_cache=False)
    for call, layer in zip(calls, recall.layers):
        torch.testing.assert_close(as_tensor(layer), brute_force(call, CONFIG))


def test_dense_and_sparse_inputs_differ_past_the_first_layer():
    """The sparse phase feeds later layers what sparse layers wrote, and the measure follows."""
    read = ids(1, 40)
    dense, sparse = (evaluate_recall(converted(p), read).layers for p in ("dense", "sparse"))
    torch.testing.assert_close(as_tensor(dense[0]), as_tensor(sparse[0]))
    assert not torch.allclose(as_tensor(dense[-1]), as_tensor(sparse[-1]))


def test_a_derived_index_beats_a_random_one():
    read = ids(2, 60)
    derived, random = (evaluate_recall(converted("dense", i), read) for i in ("main", "random"))
    assert derived.mean("score_recall") > random.mean("score_recall")


def test_batches_of_different_lengths_are_pooled_by_queries():
    model, rows = converted("dense"), [ids(1, 40)[0], ids(1, 25)[0], ids(1, 9)[0]]
    together = evaluate_recall(model, rows).layers[0]
    parts = [evaluate_recall(model, [row]).layers[0] for row in rows[:2]]
    expected = sum(p.queries * as_tensor(p) for p in parts) / sum(p.queries for p in parts)
    torch.testing.assert_close(as_tensor(together), expected)


def test_few_queries_stand_for_all():
    model, read = converted("dense"), ids(1, 60)
    few = evaluate_recall(model, read, max_queries=7)
    assert few.layers[0].queries == 7
    whole = evaluate_recall(model, read)
    assert few.mean("oracle_mass") == pytest.approx(whole.mean("oracle_mass"), abs=0.1)


def test_a_probe_logs_layers_and_means_and_leaves_the_model_alone():
    model = converted("warmup").train()
    before = [p.clone() for p in model.parameters()]
    logged = probe(model, ids(2, 40))
    layers = hf.msa_layers(model)
    for name in ("block_recall", "score_recall", "captured_mass"):
        mean = sum(logged[f"{name}/layer_{n}"] for n in layers) / len(layers)
        assert logged[name] == pytest.approx(mean) and 0 < logged[name] <= 1
    assert len(logged) == 3 * (1 + len(layers))
    assert model.training and all(map(torch.equal, before, model.parameters()))
    assert {m.msa_phase for m in model.msa_attentions()} == {"warmup"}


def test_one_layer_is_held_at_a_time():
    model, held = converted("sparse"), []
    with hf.capture_attention(model):
        pass
    run_and_look(model, list(ids(2, 20)), lambda call: held.append(call.layer))
    assert held == hf.msa_layers(model), "shown in order, each once per batch"


def test_masses_are_measured_in_full_precision_under_autocast():
    model, seen = converted("dense"), []

    def look(call):
        seen.append((call.q.dtype, torch.is_autocast_enabled("cpu")))

    run_and_look(model, list(ids(1, 20)), look, autocast_dtype=torch.bfloat16)
    assert seen == [(torch.bfloat16, False)] * 3


def test_a_dense_model_and_a_short_text_are_refused():
    with pytest.raises(ValueError, match="convert it first"):
        evaluate_recall(tiny_model("qwen3"), ids(1, 40))
    with pytest.raises(ValueError, match="top_k \\* block_size = 12"):
        probe(converted("sparse"), ids(1, 12))
