"""Several processes train one model: who does what.

Started by `torchrun` or `accelerate launch`, every process runs the same program. A step of a
recipe stays what it is: its sequences are shared by the processes, so the weights come out the same
for any number of them. The first process alone prints and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset

from openmsa.training.phases import Phase

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Processes:
    """This process among the others: `rank` of `size`; `context` neighbours share each sequence.

    group: those neighbours, None for one. shard: whether weights, gradients and moments are shared
    by all (FSDP2) instead of held by each (DDP).
    """

    rank: int = 0
    size: int = 1
    context: int = 1
    group: dist.ProcessGroup | None = None
    shard: bool = False

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share_of(self, phase: Phase) -> tuple[int, int]:
        """(sequences per forward pass, passes per step) of this process.

        Raises ValueError where the sequences of a step cannot be shared evenly.
        """
        readers = self.size // self.context
        total = phase.batch_size * phase.accumulate
        if total % readers:
            raise ValueError(
                f"the {total} sequences of a step (batch_size x accumulate) of phase "
                f"{phase.name!r} cannot be shared by {readers} readers; use a multiple of {readers}"
            )
        mine = total // readers
        batch_size = next(n for n in range(min(phase.batch_size, mine), 0, -1) if mine % n == 0)
        return batch_size, mine // batch_size

    def first_does(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in the first process; the others wait for it, and fail as it does."""
        if self.size == 1:
            return work()
        told: list = [None, None]
        if self.first:
            try:
                told[0] = work()
            except (ValueError, OSError) as error:
                told[1] = error
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def part(self) -> None:
        """The work is done: leave the others."""
        if self.size > 1:
            dist.destroy_process_group()

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


def join(*, shard: bool = False, context: int = 1) -> Processes:
    """Meet the other processes, if the program was started as one of several.

    shard: share weights by FSDP2. context: how many processes share each sequence.
    Raises ValueError where that takes more processes than there are, or does not divide them.
    """
    from accelerate import PartialState

    on_gpu = torch.cuda.is_available()
    several = dist.is_available() and dist.is_torchelastic_launched()
    backend = "cpu:gloo,cuda:nccl" if on_gpu and several else None
    state = PartialState(cpu=not on_gpu, backend=backend)
    rank, size = state.process_index, state.num_processes
    start = "start the program by `torchrun --nproc-per-node N`"
    if shard and size == 1:
        raise ValueError(f"shard=True needs several processes; {start}")
    if context < 1 or size % context:
        raise ValueError(
            f"context={context} must divide the number of processes, which is {size}; {start}"
        )
    group = None
    if context > 1:
        groups = [dist.new_group(range(i, i + context)) for i in range(0, size, context)]
        group = groups[rank // context]
    return Processes(rank, size, context, group, shard)


def same_everywhere(model: nn.Module, processes: Processes) -> None:
    """Give every process the weights of the first; a random start may differ."""
    if processes.size > 1:
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                dist.broadcast(x, 0)


def not_finite(model: nn.Module, processes: Processes) -> str | None:
    """The name of a weight that holds NaN or infinity anywhere, the same in every process."""
    from torch.distributed.tensor import DTensor

    names, faults = [], []
    for name, weight in model.named_parameters():
        part = weight.detach()
        part = part.to_local() if isinstance(part, DTensor) else part
        names.append(name)
        faults.append((~torch.isfinite(part)).any())
    found = processes.total(torch.stack(faults).int()).nonzero()
    return names[int(found[0])] if len(found) else None


def context_loader(dataset: Dataset, batch_size: int, processes: Processes) -> DataLoader:
    """Batches of `dataset`, each read by the processes of one context, which share its tokens."""
    from torch.utils.data import default_collate

    from openmsa.hf import split_context

    readers, reader = processes.size // processes.context, processes.rank // processes.context
    starts = range(reader * batch_size, len(dataset), readers * batch_size)
    batches = [range(i, i + batch_size) for i in starts]

    def collate(rows: list) -> dict:
        return split_context(default_collate(rows), group=processes.group)

    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)


def full_weights(trainer) -> dict[str, Tensor] | None:
    """All weights of a sharded model, in the first process; None where every process has them."""
    if not trainer.is_fsdp_enabled:
        return None
    return trainer.accelerator.get_state_dict(trainer.model)
