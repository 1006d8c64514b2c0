"""reverse_index: every query on the list of every block that it reads, and nowhere else."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmsa import Selection, select_blocks
from openmsa.ops import reverse_index as reversing
from openmsa.ops.reverse_index import reverse_index
from tests.support import borders, index_qk


def by_hand(blocks, block_size, tq, sk):
    """The lists once more, block by block; of packed sequences one after the other."""
    b, g, _, _ = blocks.shape
    lists = []
    for i in range(b):
        for j in range(g):
            q0 = 0
            for queries, keys in zip(tq, sk):
                for n in range(-(-keys // block_size)):
                    lists.append(
                        [
                            q0 + x
                            for x in range(queries)
                            if n in blocks[i, j, q0 + x].tolist()
                            and n * block_size <= keys - queries + x
                        ]
                    )
                q0 += queries
    return lists


def lists_of(index, copies):
    begin, queries = index.begin.tolist(), index.queries.tolist()
    lists = [queries[start:end] for start, end in pairwise(begin)]
    return [lists[i * index.rows : (i + 1) * index.rows] for i in range(copies)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=4),
    block_size=st.integers(1, 7),
    k=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_lists_hold_who_reads(lengths, block_size, k, seed):
    """Selections that no selector would make: unsorted, repeated, negative, from the future."""
    tq, sk = [q for q, _ in lengths], [q + more for q, more in lengths]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(-2, 9, (1, 2, sum(tq), k), generator=generator, dtype=torch.int32)
    packed = {"cu_seqlens_q": borders(*tq), "cu_seqlens_k": borders(*sk)}
    index = reverse_index(Selection(blocks, block_size), sum(sk), **packed)
    wanted = by_hand(blocks, block_size, tq, sk)
    rows = len(wanted) // 2
    for group, found in enumerate(lists_of(index, 2)):
        assert found[:rows] == wanted[group * rows : (group + 1) * rows]
        assert not any(found[rows:])


def test_a_batch_is_indexed_sequence_by_sequence():
    selection = select_blocks(*index_qk(2, 23, 40, 3, 8), block_size=4, top_k=3)
    index = reverse_index(selection, 40)
    assert index.rows == 10 and index.first_key.tolist() == list(range(0, 40, 4))
    assert list(chain(*lists_of(index, 6))) == by_hand(selection.blocks, 4, [23], [40])


@pytest.mark.parametrize("t", [0, 5])
def test_nothing_selected(t):
    index = reverse_index(Selection(torch.full((1, 1, t, 2), -1, dtype=torch.int32), 4), 8)
    assert index.begin.tolist() == [0, 0, 0]


@pytest.mark.parametrize("at_once", [1, 2])
def test_groups_one_after_the_other_give_the_same(monkeypatch, at_once):
    blocks = select_blocks(*index_qk(2, 40, 60, 3, 8), block_size=4, top_k=5).blocks
    blocks[:, 1, 7:] = -1  # a group whose lists are short
    whole = reverse_index(Selection(blocks, 4), 60)
    bytes_of_a_group = reversing.PAIR_BYTES * blocks[0, 0].numel()
    monkeypatch.setattr(reversing, "WORKSPACE_BYTES", at_once * bytes_of_a_group)
    cut = reverse_index(Selection(blocks, 4), 60)
    number = int(whole.begin[-1])
    assert number < whole.queries.numel() and torch.equal(whole.begin, cut.begin)
    assert torch.equal(whole.queries[:number], cut.queries[:number])


def test_compiles_without_a_break():
    selection = select_blocks(*index_qk(1, 16, 16, 2, 4), block_size=4, top_k=2)
    run = torch.compile(
        lambda blocks: reverse_index(Selection(blocks, 4), 16), fullgraph=True, backend="eager"
    )
    for ours, plain in zip(run(selection.blocks), reverse_index(selection, 16)):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(plain))
