"""Sequences too long for one device: a batch shared by the processes of a group, token by token.

    inputs = split_context(batch)          # the same batch in every process of the group
    out = model(**inputs)                  # a converted model; logits of the tokens held here
    out.loss.backward()                    # losses and gradients add up over the processes

The batch becomes one packed row without its padding, and each process holds two chunks of it (see
openmsa.ops.context_parallel). Labels are shifted before the row is cut, and the loss is divided by
the labels and tokens of the whole batch, so the sum over the processes is the loss of the batch,
and the sum of the gradients its gradient. Where DDP or FSDP averages gradients over n processes,
multiply the loss by n.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist

from openmsa.hf.layout import Layout, find_layout
from openmsa.ops.context_parallel import Context, attend_in_chunks, slice_context
from openmsa.ops.dense_attention import dense_attention

TAKES = {
    "input_ids",
    "labels",
    "shift_labels",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}
NO_LABEL = -100


def split_context(batch: Mapping, *, group: dist.ProcessGroup | None = None) -> dict:
    """The part of a batch that this process works on, as arguments of a converted model.

    batch: input_ids [b, t], and as transformers takes them labels or shift_labels, attention_mask,
    position_ids, cu_seq_lens_q; the same in every process of `group` (None: all). The result holds
    input_ids, position_ids and labels [1, held], the `context`, and the numbers of labels and
    tokens of the whole batch, by which the losses are divided. A label that padding would predict
    is left out. Where micro-batches are accumulated, give num_items_in_batch and
    index_rows_in_batch the numbers of all of them.
    Raises ValueError for other entries, and as slice_context and find_layout do.
    """
    if unknown := sorted(set(batch) - TAKES):
        raise ValueError(
            f"{unknown[0]} cannot be shared over a context; a batch may hold "
            f"{', '.join(sorted(TAKES))}"
        )
    ids = batch["input_ids"]
    layout = find_layout(
        batch=ids.shape[0],
        num_queries=ids.shape[1],
        num_cached=0,
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        cu_seqlens=batch.get("cu_seq_lens_q"),
    )
    borders = _borders(ids) if layout is None else layout.cu_seqlens_k.to(ids.device)
    context = slice_context(borders, group=group)
    inputs = {
        "input_ids": _held(ids, layout, context, 0),
        "position_ids": _held(_positions(batch, layout, borders), layout, context, 0),
        "context": context,
        "index_rows_in_batch": context.num_tokens,
    }
    shifted = _shifted(batch)
    if shifted is not None:
        row = _row(shifted, layout)
        held = context.take(row, NO_LABEL)[None]
        inputs |= {"labels": held, "shift_labels": held}
        inputs["num_items_in_batch"] = (row != NO_LABEL).sum()
    return inputs


def dense_in_context(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Context,
    *,
    scale: float | None,
    sliding_window: int | None,
) -> Tensor:
    """A layer that was left dense: query [1, h, t, d], key and value [1, g, t, d] -> [1, t, h, d].

    Raises ValueError for a layer with a sliding window.
    """
    if sliding_window is not None:
        raise ValueError(
            f"layer {module.layer_idx} stays dense with a sliding window of {sliding_window} "
            "tokens, which a context cannot be shared over; convert it as well"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))

    def attend(part, chunk):
        borders = {"cu_seqlens_q": chunk.cu_seqlens_q, "cu_seqlens_k": chunk.cu_seqlens_k}
        return dense_attention(part["q"], part["k"], part["v"], scale=scale, **borders), None

    return attend_in_chunks(context, {"q": q}, {"k": k, "v": v}, attend)[0]


def check_alone(kwargs: dict) -> None:
    """Raises ValueError for arguments of a forward pass that contradict a context."""
    for name in ("attention_mask", "cache", "past_key_values", "cu_seq_lens_q", "inputs_embeds"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} cannot come with a context; give it to split_context, or leave it out"
            )


def _borders(ids: Tensor) -> Tensor:
    """Every row is one sequence."""
    return torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1]


def _row(x: Tensor, layout: Layout | None) -> Tensor:
    """[b, t] -> [tokens], the real ones in order."""
    slots = None if layout is None else layout.key_slots
    return x.flatten() if slots is None else x.flatten().index_select(0, slots.to(x.device))


def _held(x: Tensor, layout: Layout | None, context: Context, filling: int) -> Tensor:
    return context.take(_row(x, layout), filling)[None]


def _positions(batch: Mapping, layout: Layout | None, borders: Tensor) -> Tensor:
    """Those given, or those that the model would count itself, [b, t]."""
    ids, given = batch["input_ids"], batch.get("position_ids")
    if given is not None:
        return given.expand_as(ids)
    places = torch.arange(ids.shape[1], device=ids.device)
    if layout is not None and layout.key_slots is None:
        starts = borders[:-1].long().repeat_interleave(borders.diff().long())
        return (places - starts)[None]
    return places.expand_as(ids)


def _shifted(batch: Mapping) -> Tensor | None:
    """The label of every token's successor, [b, t], as the loss of transformers shifts them."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = batch.get("labels")
    if labels is None:
        return None
    return nn.functional.pad(labels, (0, 1), value=NO_LABEL)[:, 1:]
