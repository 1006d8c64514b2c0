"""Looking into a converted model while it runs: one attention call at a time.

`openmsa.hf.capture_attention` collects what every sparse layer attends with; here each layer's call
is shown and dropped before the next layer runs, so a long text costs the memory of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import openmsa
from openmsa import hf
from openmsa.evaluation.batches import batches_of_equal_length, evaluating, last_logits_only
from openmsa.hf.room import Budget


def run_and_look(
    model,
    sequences: Sequence[Tensor],
    look: Callable[[hf.AttentionCall], None],
    batch_size: int = 4,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run a converted model over the sequences and show `look` each layer's call as it happens."""
    device, done = next(model.parameters()).device, 0
    only = last_logits_only(model)
    with evaluating(model, autocast_dtype), hf.capture_attention(model) as calls:

        def drain(*_) -> None:
            with torch.autocast(device.type, enabled=False):  # masses are measured in fp32
                while calls:
                    look(calls.pop(0))

        hooks = [m.register_forward_hook(drain) for m in model.modules() if _is_sparse(m)]
        try:
            for rows in batches_of_equal_length([len(s) for s in sequences], batch_size):
                batch = torch.stack([sequences[row] for row in rows]).to(device)
                model(input_ids=batch, use_cache=False, **only)
                drain()
                done += len(rows)
                if progress is not None:
                    progress(done, len(sequences))
        finally:
            for hook in hooks:
                hook.remove()


def selected_blocks(call: hf.AttentionCall, budget: Budget) -> Tensor:
    """The selection of one captured call, int [b, g, t, k]; chosen now if it chose none.

    Raises ValueError if it chose none and the mechanism has no index that could.
    """
    if call.selection is not None:
        return call.selection.blocks
    if call.room is not None:
        return call.room.select(call).blocks
    return openmsa.select_blocks(
        call.q_index,
        call.k_index,
        block_size=budget.block_size,
        top_k=budget.top_k,
        local_blocks=budget.local_blocks,
        sink_blocks=budget.sink_blocks,
        index_scale=call.index_scale,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
    ).blocks


def sequences_of(call: hf.AttentionCall) -> Iterator[tuple[int, slice, slice]]:
    """(batch row, its queries, its keys) of every sequence of a captured call."""
    if call.cu_seqlens_q is None:
        for row in range(call.q.shape[0]):
            yield row, slice(0, call.q.shape[1]), slice(0, call.k.shape[1])
        return
    borders_q, borders_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for n in range(len(borders_q) - 1):
        yield 0, slice(*borders_q[n : n + 2]), slice(*borders_k[n : n + 2])


def as_mask(blocks: Tensor, num_blocks: int) -> Tensor:
    """Block numbers int [..., k], -1 for none -> bool [..., num_blocks]."""
    places = blocks.long().where(blocks >= 0, num_blocks)
    mask = torch.zeros(*blocks.shape[:-1], num_blocks + 1, dtype=torch.bool, device=blocks.device)
    return mask.scatter_(-1, places, True)[..., :num_blocks]


def check_budget(model, num_tokens: int) -> Budget:
    """The budget of an index. Raises ValueError if there is none or `num_tokens` fit into it."""
    if not hf.is_converted(model):
        raise ValueError(
            f"model is a dense {type(model).__name__}; convert it first, or ask "
            "openmsa.evaluation.inspection.will_it_bear about it"
        )
    if not hf.has_index(model):
        raise ValueError(
            f"{hf.mechanism_of(model)} has no index that learns what to select, so there is no "
            "recall to measure; ask selection_map what it selects"
        )
    budget = hf.room_of(model).budget
    if num_tokens <= budget.tokens:
        raise ValueError(
            f"the longest sequence has {num_tokens} tokens and the budget is top_k * block_size = "
            f"{budget.tokens}, so every block is selected; give sequences of more tokens"
        )
    return budget


def _is_sparse(module) -> bool:
    return hasattr(module, "msa_room")
