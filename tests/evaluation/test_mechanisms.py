"""What recall and selection maps say about mechanisms other than MSA."""

from __future__ import annotations

import pytest
import torch

from openmsa import hf
from openmsa.evaluation.inspection import selection_map, will_it_bear
from openmsa.evaluation.recall import evaluate_recall
from openmsa.mechanisms.dsa import DSAConfig
from tests.hf.mechanisms import EVERYTHING, SMALL, WITH_INDEX, converted
from tests.hf.tiny import tiny_tokens

TOKENS = 45


def test_recall_of_an_index_of_tokens_is_counted_by_hand():
    """One choice for all heads: the oracle keeps the tokens that all heads together read most."""
    config = DSAConfig(top_k=7, index_heads=4, d_index=16)
    model, ids = converted("dsa", config=config), tiny_tokens(1, TOKENS)
    found = evaluate_recall(model, ids)
    assert (found.block_size, found.top_k) == (1, 7)
    with torch.no_grad(), hf.capture_attention(model) as calls:
        model(ids)
    for layer, call in zip(found.layers, calls, strict=True):
        k = call.k[0].repeat_interleave(2, 1)
        kept = {"block": [], "score": [], "captured": [], "oracle": []}
        for i in range(7, TOKENS):
            weights = torch.einsum("hd,shd->hs", call.q[0, i], k[: i + 1]) * call.scale
            mass = weights.softmax(-1).mean(0)
            best = set(mass.topk(7).indices.tolist())
            chosen = set(call.selection.blocks[0, 0, i].tolist())
            total = sum(mass[s].item() for s in best)
            kept["block"].append(len(best & chosen) / 7)
            kept["score"].append(sum(mass[s].item() for s in best & chosen) / total)
            kept["captured"].append(sum(mass[s].item() for s in chosen))
            kept["oracle"].append(total)
        assert layer.queries == TOKENS - 7
        means = [sum(values) / len(values) for values in kept.values()]
        ours = [layer.block_recall, layer.score_recall, layer.captured_mass, layer.oracle_mass]
        assert ours == [(pytest.approx(mean, abs=1e-5),) for mean in means]


@pytest.mark.parametrize("name", WITH_INDEX)
def test_recall_is_the_same_in_warm_up_where_the_index_chooses_in_vain(name):
    """Layer 0 reads the same hidden states whatever the phase."""
    model, ids, first = converted(name), tiny_tokens(1, TOKENS), {}
    for phase in ("sparse", "warmup"):
        hf.set_phase(model, phase)
        first[phase] = evaluate_recall(model, ids).layers[0]
    assert first["sparse"] == first["warmup"]


@pytest.mark.parametrize("name", [name for name in SMALL if name not in WITH_INDEX])
def test_without_an_index_there_is_no_recall(name):
    with pytest.raises(ValueError, match=f"{name.split()[0]} has no index that learns"):
        evaluate_recall(converted(name), tiny_tokens(1, TOKENS))
    with pytest.raises(ValueError, match="converted already"):
        will_it_bear(converted(name), tiny_tokens(1, TOKENS), SMALL["msa"])


@pytest.mark.parametrize("name", [name for name in SMALL if name != "window"])
def test_maps_show_what_a_layer_selected(name):
    model, ids = converted(name), tiny_tokens(2, TOKENS)
    made = selection_map(model, ids)
    with torch.no_grad(), hf.capture_attention(model) as calls:
        model(ids)
    size = made.block_size
    assert made.layers == (0, 1, 2) and size == calls[1].selection.block_size
    blocks = calls[1].selection.blocks
    assert len(made.probability[1]) == blocks.shape[1]
    for q, n in ((8, 2), (10, 10), (9, 7)):
        asked = blocks[:, :, q * size : (q + 1) * size]
        share = (asked == n).any(-1).double().mean((0, 2))
        for group, expected in enumerate(share.tolist()):
            assert made.probability[1][group][q][n] == pytest.approx(expected, abs=1e-4)


def test_nothing_selected_is_said():
    with pytest.raises(ValueError, match="window reads by position alone"):
        selection_map(converted("window"), tiny_tokens(1, TOKENS))
    short = converted("infllm2", config=EVERYTHING["infllm2"])
    with pytest.raises(ValueError, match=r"infllm2 selected nothing in layer 0.*too short"):
        selection_map(short, tiny_tokens(1, TOKENS))
    dense = converted("moba")
    hf.set_phase(dense, "dense")
    with pytest.raises(ValueError, match="moba selected nothing in layer 0: .* phase 'dense'"):
        selection_map(dense, tiny_tokens(1, TOKENS))
