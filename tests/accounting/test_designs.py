"""What each mechanism reads, against walking through every query of a small sequence."""

from __future__ import annotations

import pytest
import torch

from openmsa.accounting import designs
from openmsa.accounting.shapes import Shape

SHAPE = Shape("tiny", d_model=24, layers=2, h=6, g=2, d=5, d_value=7, vocab=11)
S = 131


def own_and_whole_blocks(i: int, size: int, k: int) -> int:
    """Keys of query i's own block and of as many others as there are, k blocks in all."""
    own = i // size
    return len(range(own * size, i + 1)) + size * min(own, k - 1)


def whole_windows(i: int, length: int, stride: int) -> int:
    return sum(start + length <= i + 1 for start in range(0, i + 1, stride))


def walk(name: str, i: int) -> dict[str, int]:
    """Keys that query i meets in each pass of the mechanism as it is set below."""
    sets = {
        "dense": {"all": i + 1},
        "msa": {"index": i + 1, "blocks": own_and_whole_blocks(i, 8, 3)},
        "nsa": {
            "compressed": whole_windows(i, 6, 3),
            "blocks": own_and_whole_blocks(i, 8, 4),
            "window": len(range(max(0, i - 9), i + 1)),
        },
        "moba": {"means": i // 16, "blocks": own_and_whole_blocks(i, 16, 2)},
        "infllm2": {
            "means": whole_windows(i, 4, 2),
            "coarse": whole_windows(i, 16, 8),
            "blocks": own_and_whole_blocks(i, 4, 7),
        },
        "dsa": {"index": i + 1, "tokens": min(i + 1, 9)},
        "window": {"window": len({j for j in range(i + 1) if j < 2 or i - j < 20})},
    }
    return sets[name]


SETTINGS = {
    "dense": {},
    "msa": {"block_size": 8, "top_k": 3},
    "nsa": {
        "compress_tokens": 6,
        "stride_tokens": 3,
        "block_size": 8,
        "top_k": 4,
        "window_tokens": 10,
    },
    "moba": {"block_size": 16, "top_k": 2},
    "infllm2": {
        "compress_tokens": 4,
        "stride_tokens": 2,
        "block_size": 4,
        "top_k": 5,
        "local_blocks": 2,
        "dense_tokens": 30,
    },
    "dsa": {"top_k": 9, "index_heads": 3, "d_index": 4},
    "window": {"window_tokens": 20, "sink_tokens": 2},
}


@pytest.mark.parametrize("name", designs.DESIGNS)
def test_every_query_meets_what_the_mechanism_says(name):
    passes = designs.make(name, SETTINGS[name]).passes(torch.arange(1, S + 1), S, SHAPE)
    walked = [walk(name, i) for i in range(S)]
    assert {p.name for p in passes} == set(walked[0])
    for part in passes:
        assert part.keys.tolist() == [found[part.name] for found in walked], part.name


@pytest.mark.parametrize("name", designs.DESIGNS)
def test_no_query_attends_to_more_than_the_budget(name):
    design = designs.make(name, SETTINGS[name])
    passes = design.passes(torch.arange(1, S + 1), S, SHAPE)
    read = sum(p.keys for p in passes if not p.chooses)
    if design.budget_tokens is None:
        assert name == "dense"
    else:
        assert int(read.max()) <= design.budget_tokens


def test_heads_that_choose_apart_read_apart_but_not_more_than_there_is():
    moba = designs.make("moba", {"block_size": 4, "top_k": 3})
    chosen = moba.passes(torch.tensor([4, 13, 60]), 60, SHAPE)[1]
    # r = 3 heads: the own block once, two others for each head; 13 visible keys are the most.
    assert chosen.read.tolist() == [4, 13, 4 + 3 * 8]


def test_infllm2_is_dense_in_short_sequences():
    design = designs.make("infllm2", {"dense_tokens": 40})
    short = design.passes(torch.tensor([40]), 40, SHAPE)
    assert [p.name for p in short] == ["all"] and not short[0].chooses
    assert len(design.passes(torch.tensor([40]), 41, SHAPE)) == 3


def test_what_is_kept_beside_keys_and_values():
    kept = {n: designs.make(n, SETTINGS[n]).index_width(S, SHAPE) for n in designs.DESIGNS}
    assert kept["msa"] == S * SHAPE.d and kept["dsa"] == S * 4
    assert kept["moba"] == S // 16 * SHAPE.g * SHAPE.d
    means = whole_windows(S - 1, 4, 2) + whole_windows(S - 1, 16, 8)
    assert kept["infllm2"] == means * SHAPE.g * SHAPE.d
    assert kept["dense"] == kept["window"] == kept["nsa"] == 0
    rows = {n: designs.make(n, SETTINGS[n]).kept_rows(S) for n in designs.DESIGNS}
    assert rows["window"] == 22 and rows["nsa"] == S + whole_windows(S - 1, 6, 3) + 6 + 10
    assert rows["dense"] == rows["msa"] == rows["moba"] == rows["infllm2"] == rows["dsa"] == S


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("msaa", {}, "did you mean msa"),
        ("xyz", {}, "there are dense, msa"),
        ("msa", {"topk": 3}, "no number 'topk'; it has block_size, top_k"),
        ("dense", {"top_k": 3}, "it has none"),
        ("moba", {"top_k": 0}, r"moba.top_k must be at least 1, got 0"),
        ("window", {"sink_tokens": -1}, "at least 0"),
    ],
)
def test_what_is_not_there_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        designs.make(name, changes)
