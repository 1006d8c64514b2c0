"""Selection maps count what was selected; bearing judges a dense model and leaves it alone."""

from __future__ import annotations

import math

import pytest
import torch

import openmsa
from openmsa import hf
from openmsa.evaluation.inspection import selection_map, will_it_bear
from openmsa.evaluation.plain import from_plain, to_plain
from openmsa.evaluation.recall import evaluate_recall
from tests.hf.tiny import tiny_model, tiny_tokens

CONFIG = openmsa.MSAConfig(block_size=4, top_k=3)


def converted(phase="sparse"):
    model = hf.convert(tiny_model("qwen3"), CONFIG)
    hf.set_phase(model, phase)
    return model


@pytest.mark.parametrize("t", [13, 40, 43])
def test_a_map_is_the_share_of_queries_that_select_a_block(t):
    model, read = converted(), tiny_tokens(2, t)
    maps = selection_map(model, read)
    with hf.capture_attention(model) as calls, torch.no_grad():
        model(input_ids=read, use_cache=False)
    num_blocks = math.ceil(t / 4)
    for call, layer in zip(calls, maps.probability):
        for group, cells in enumerate(layer):
            for q in range(num_blocks):
                blocks = call.selection.blocks[:, group, q * 4 : q * 4 + 4]
                rows = blocks.shape[0] * blocks.shape[1]
                expected = [int((blocks == n).sum()) / rows for n in range(q + 1)]
                assert cells[q][: q + 1] == pytest.approx(expected, abs=1e-4)
                assert all(future is None for future in cells[q][q + 1 :])


def test_every_query_fills_its_budget_and_selects_its_own_block():
    maps = selection_map(converted(), tiny_tokens(1, 48))
    for layer in maps.probability:
        for group in layer:
            for q, row in enumerate(group):
                assert row[q] == 1.0
                shown = [p for p in row if p is not None]
                assert sum(shown) == pytest.approx(min(q + 1, 3), abs=0.01)


def test_wide_cells_are_means_over_their_visible_blocks():
    model, read = converted(), tiny_tokens(1, 48)
    fine, coarse = selection_map(model, read), selection_map(model, read, max_cells=6)
    assert (fine.blocks_per_cell, coarse.blocks_per_cell) == (1, 2)
    wide, narrow = coarse.probability[1][0], fine.probability[1][0]
    assert len(wide) == 6
    square = [narrow[q][n] for q in (8, 9) for n in (2, 3)]
    assert wide[4][1] == pytest.approx(sum(square) / 4, abs=2e-4)
    corner = [narrow[8][8], narrow[9][8], narrow[9][9]]
    assert wide[4][4] == pytest.approx(sum(corner) / 3, abs=2e-4)


def test_a_dense_phase_shows_what_the_index_would_select():
    maps = selection_map(converted("dense"), tiny_tokens(1, 40))
    assert maps.layers == (0, 1, 2) and maps.probability[0][0][9][9] == 1.0


def test_bearing_is_the_recall_of_a_derived_index_under_dense_attention():
    model, read = tiny_model("qwen3"), tiny_tokens(2, 60)
    bearing = will_it_bear(model, read, CONFIG, max_queries=None)
    trial = hf.convert(tiny_model("qwen3"), CONFIG)
    hf.set_phase(trial, "dense")
    recall = evaluate_recall(trial, read)
    for judged, layer in zip(bearing.layers, recall.layers):
        assert judged.oracle_mass == pytest.approx(layer.mean("oracle_mass"), abs=1e-6)
        assert judged.captured_mass == pytest.approx(layer.mean("captured_mass"), abs=1e-6)
        assert judged.captured_mass <= judged.oracle_mass + 1e-6


def test_verdicts_follow_the_rule():
    model, read = tiny_model("qwen3"), tiny_tokens(1, 60)
    base = will_it_bear(model, read, CONFIG)
    for layer in base.layers:
        for threshold, verdict in (
            (layer.captured_mass - 1e-3, "ready"),
            ((layer.captured_mass + layer.oracle_mass) / 2, "train"),
            (layer.oracle_mass + 1e-3, "keep dense"),
        ):
            judged = will_it_bear(model, read, CONFIG, threshold=min(threshold, 1.0))
            assert judged.layers[layer.layer].verdict == verdict
            assert (layer.layer in judged.keep_dense) == (verdict == "keep dense")
            assert sorted(judged.keep_dense + judged.convert) == [0, 1, 2]


def test_a_budget_of_everything_is_borne_by_every_layer():
    wide = openmsa.MSAConfig(block_size=4, top_k=14)
    bearing = will_it_bear(tiny_model("qwen3"), tiny_tokens(1, 60), wide, threshold=0.9)
    assert all(layer.oracle_mass > 0.9 for layer in bearing.layers)


def test_the_judged_model_is_not_touched():
    model = tiny_model("qwen3").train()
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    kind, layer = type(model), type(model.model.layers[0].self_attn)
    will_it_bear(model, tiny_tokens(1, 40), CONFIG)
    assert type(model) is kind and type(model.model.layers[0].self_attn) is layer
    assert not hf.is_msa(model) and model.training
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, values) in before.items():
        assert after[name] is parameter and torch.equal(parameter, values)


def test_weights_are_shared_with_the_trial_not_copied(monkeypatch):
    model, seen = tiny_model("qwen3"), []
    convert = hf.convert
    monkeypatch.setattr(hf, "convert", lambda m, *a, **k: seen.append(m) or convert(m, *a, **k))
    will_it_bear(model, tiny_tokens(1, 40), CONFIG)
    trial = dict(seen[0].named_parameters())
    assert seen[0] is not model
    assert all(trial[name] is parameter for name, parameter in model.named_parameters())


def test_results_survive_json():
    bearing = will_it_bear(tiny_model("qwen3"), tiny_tokens(1, 40), CONFIG)
    assert from_plain(type(bearing), to_plain(bearing)) == bearing
    maps = selection_map(converted(), tiny_tokens(1, 40))
    assert from_plain(type(maps), to_plain(maps)) == maps


def test_wrong_models_and_texts_are_refused():
    with pytest.raises(ValueError, match="convert it first"):
        selection_map(tiny_model("qwen3"), tiny_tokens(1, 40))
    with pytest.raises(ValueError, match="converted already"):
        will_it_bear(converted(), tiny_tokens(1, 40), CONFIG)
    with pytest.raises(ValueError, match="one length"):
        selection_map(converted(), [tiny_tokens(40), tiny_tokens(39)])
    with pytest.raises(ValueError, match="max_cells"):
        selection_map(converted(), tiny_tokens(1, 40), max_cells=1)
    with pytest.raises(ValueError, match="threshold"):
        will_it_bear(tiny_model("qwen3"), tiny_tokens(1, 40), CONFIG, threshold=1.5)
    with pytest.raises(ValueError, match="budget is top_k"):
        will_it_bear(tiny_model("qwen3"), tiny_tokens(1, 12), CONFIG)
