"""Context parallelism: one long row of tokens, shared by the processes of a group.

The row is cut into 2 n chunks for n processes, and process r holds chunks r and 2 n - 1 - r: early
and late together, every process sees about as many keys as the others. Queries stay where they
are, keys are gathered whole. The queries of a chunk are then the last of the keys up to its end,
sequence by sequence where the row is packed: what every operation here takes for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of the row, and the keys that they see.

    queries: their places among the tokens that this process holds. keys: places in the whole row,
    from the start of the chunk's first sequence to the end of the chunk. cu_seqlens_q,
    cu_seqlens_k: int32 [sequences + 1].
    """

    queries: slice
    keys: slice
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @property
    def num_queries(self) -> int:
        """Tokens of this chunk."""
        return self.queries.stop - self.queries.start


@dataclass(frozen=True, eq=False)
class Context:
    """What this process holds of a packed row of `num_tokens` tokens.

    places: int64 [held], where the tokens stand in the row; places from num_tokens on are filling,
    which brings every process to the same number. chunks: those that hold real tokens. longest:
    tokens of the row's longest sequence. rank and size: of the process in its group.
    """

    places: Tensor
    chunks: tuple[Chunk, ...]
    num_tokens: int
    longest: int
    rank: int
    size: int
    group: dist.ProcessGroup | None

    @property
    def num_queries(self) -> int:
        """Real tokens that this process holds."""
        return sum(chunk.num_queries for chunk in self.chunks)

    def take(self, x: Tensor, filling: float) -> Tensor:
        """This process's part of x [num_tokens, ...], with `filling` where there is no token."""
        held = x[self.places.clamp(max=self.num_tokens - 1)]
        held[self.places >= self.num_tokens] = filling
        return held


def slice_context(
    cu_seqlens: Tensor | Sequence[int], *, group: dist.ProcessGroup | None = None
) -> Context:
    """This process's part of a packed row; every process of `group` (None: all) must call it alike.

    cu_seqlens: int [sequences + 1], from 0 to the tokens of the row; one sequence is [0, tokens].
    The tensors of the result are on its device, or on the CPU.
    Raises ValueError without a process group, for borders that do not ascend from 0, and for fewer
    than two tokens for each process.
    """
    _check_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) else torch.device("cpu")
    borders = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    _check_row(borders, size)
    total = borders[-1]
    length = -(-total // (2 * size))
    starts = [number * length for number in (rank, 2 * size - 1 - rank)]
    chunks = [
        _chunk(borders, start, min(start + length, total), held, device)
        for start, held in zip(starts, (0, length), strict=True)
        if start < total
    ]
    return Context(
        places=torch.cat([torch.arange(n, n + length, device=device) for n in starts]),
        chunks=tuple(chunks),
        num_tokens=total,
        longest=max(stop - start for start, stop in pairwise(borders)),
        rank=rank,
        size=size,
        group=group,
    )


def _check_group() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "context parallelism needs a process group: start the program by torchrun and call "
            "torch.distributed.init_process_group() first"
        )


def _check_row(borders: list[int], size: int) -> None:
    if len(borders) < 2 or borders[0] != 0 or sorted(borders) != borders:
        raise ValueError(f"cu_seqlens must ascend from 0 to the tokens of the row, got {borders}")
    if borders[-1] < 2 * size:
        raise ValueError(
            f"a row of {borders[-1]} tokens is too short for {size} processes, which hold two "
            f"chunks each; give it at least {2 * size} tokens, or use fewer processes"
        )


def _chunk(borders: list[int], start: int, stop: int, held: int, device: torch.device) -> Chunk:
    """Tokens [start, stop) of the row, held from place `held` on."""
    sequences = [
        (first, min(last, stop))
        for first, last in pairwise(borders)
        if first < stop and last > start and first < last
    ]
    queries, keys = [0], [0]
    for first, last in sequences:
        queries.append(queries[-1] + last - max(first, start))
        keys.append(keys[-1] + last - first)
    return Chunk(
        queries=slice(held, held + stop - start),
        keys=slice(sequences[0][0], stop),
        cu_seqlens_q=torch.tensor(queries, dtype=torch.int32, device=device),
        cu_seqlens_k=torch.tensor(keys, dtype=torch.int32, device=device),
    )


def gather_tokens(context: Context, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[1, held, ...] each -> [1, row, ...]: the tokens of all processes in the row's order.

    The row ends with the filling, if there is any. Gradients are summed over the processes, in fp32
    at least, and come back to the process that holds the token. Every process of the group must
    call it, and run its backward pass if any of them does.
    """
    return _Gather.apply(context, *tensors)


class _Gather(torch.autograd.Function):
    """One node for all tensors, so that every process meets in the same order backward as well."""

    @staticmethod
    def forward(ctx, context: Context, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.context = context
        return tuple(_gathered(x, context) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        summed = [_summed(x, ctx.context) if w else None for x, w in zip(gradients, wanted)]
        return None, *summed


def _gathered(x: Tensor, context: Context) -> Tensor:
    held = x[0].contiguous()
    whole = held.new_empty(context.size * held.shape[0], *held.shape[1:])
    _collective("all_gather_single", "all_gather_into_tensor")(whole, held, group=context.group)
    size = context.size
    order = [2 * n if n < size else 2 * (2 * size - 1 - n) + 1 for n in range(2 * size)]
    return whole.unflatten(0, (2 * size, -1))[order].flatten(0, 1)[None]


def _summed(gradient: Tensor, context: Context) -> Tensor:
    size = context.size
    order = [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]
    wide = torch.promote_types(gradient.dtype, torch.float32)
    whole = gradient[0].unflatten(0, (2 * size, -1))[order].flatten(0, 1).to(wide)
    held = whole.new_empty(whole.shape[0] // size, *whole.shape[1:])
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(held, whole, group=context.group)
    return held.to(gradient.dtype)[None]


def _collective(name: str, before: str) -> Callable:
    """The collective called `name`, which torch up to 2.12 calls `before`."""
    return getattr(dist, name, None) or getattr(dist, before)


def attend_in_chunks(
    context: Context,
    queries: dict[str, Tensor],
    keys: dict[str, Tensor],
    attend: Callable[[dict[str, Tensor], Chunk], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """Attention over the whole row for the queries held here, and its loss averaged over them.

    queries and keys: [1, held, ...] by name. `attend` gets one chunk's part of both in one dict and
    returns its out [1, t, ...] and a scalar, the mean over its queries, or None.
    Returns out [1, held, ...], 0 for filling, and the mean over this process's real queries: the
    row's mean is the sum over processes of it times num_queries / num_tokens.
    """
    keys = dict(zip(keys, gather_tokens(context, *keys.values()), strict=True))
    outs, losses = [], []
    for chunk in context.chunks:
        part = {name: x[:, chunk.queries] for name, x in queries.items()}
        part |= {name: x[:, chunk.keys] for name, x in keys.items()}
        out, loss = attend(part, chunk)
        outs.append(out)
        if loss is not None:
            losses.append(loss * (chunk.num_queries / context.num_queries))
    outs.append(outs[0].new_zeros(1, len(context.places) - context.num_queries, *out.shape[2:]))
    return torch.cat(outs, 1), sum(losses) if losses else None
