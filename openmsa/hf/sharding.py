"""FSDP2 and the index loss, which leaves a layer beside its output.

FSDP2 gathers the weights of a layer for the backward pass when the gradient of the layer's output
arrives. The gradient of an index loss may come first, or alone: with a frozen backbone no layer's
output has one. So here it asks for the weights itself, and gives back those of the layer before.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed import is_available


def gather_for_backward(model: nn.Module, losses: Iterable[tuple[nn.Module, Tensor]]) -> None:
    """Let each index loss find the weights of its layer when it goes backward.

    losses: (attention module, scalar) of every sparse layer. Nothing happens where `model` is not
    sharded by torch.distributed.fsdp.fully_shard.
    """
    owners = _owners(model)
    if not owners:
        return
    gathered: list[nn.Module] = []
    for attention, loss in losses:
        owner = owners.get(attention)
        if owner is not None and owner is not model and loss.requires_grad:
            loss.register_hook(lambda _, owner=owner: _gather(owner, gathered))


def _gather(owner: nn.Module, gathered: list[nn.Module]) -> None:
    if gathered and gathered[-1] is not owner:
        gathered[-1].reshard()
    owner.unshard()
    gathered.append(owner)


def _owners(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For every module, the innermost one around it that is sharded by itself."""
    if not is_available():
        return {}
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return {}
    owners: dict[nn.Module, nn.Module] = {}
    for module in model.modules():  # outer modules come before inner ones
        if isinstance(module, FSDPModule):
            owners.update(dict.fromkeys(module.modules(), module))
    return owners
