"""FSDP2 and the index loss, which leaves a layer beside its output.

FSDP2 gathers the weights of a layer for the backward pass when the gradient of the layer's output
arrives. The gradient of an index loss may come first, or alone: with a frozen backbone no layer's
output has one. So here it asks for the weights itself, and gives back those of the layer before.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed import is_available


def gather_for_backward(
    model: nn.Module, losses: Iterable[tuple[nn.Module, Tensor]], *, frozen: bool
) -> None:
    """Let each index loss find the weights of its layer when it goes backward.

    losses: (attention module, scalar) of every sparse layer. frozen: whether the model's output has
    no gradient. Nothing happens where no part of `model` is sharded by
    torch.distributed.fsdp.fully_shard.
    Raises ValueError where it is frozen and its layers are sharded with nothing around them.
    """
    owners = _owners(model)
    if not owners:
        return
    gathered: list[nn.Module] = []
    for attention, loss in losses:
        owner = owners.get(attention)
        if owner is None or owner is model or not loss.requires_grad:
            continue
        if frozen and owner._get_fsdp_state()._is_root:
            raise ValueError(
                "the layers are sharded and the backbone is frozen: call fully_shard on the model "
                "as well, for its loss alone tells FSDP that the backward pass begins"
            )
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

    owners: dict[nn.Module, nn.Module] = {}
    for module in model.modules():  # outer modules come before inner ones
        if isinstance(module, FSDPModule):
            owners.update(dict.fromkeys(module.modules(), module))
    return owners
