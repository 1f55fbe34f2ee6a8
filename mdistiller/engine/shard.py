"""A frozen teacher in parts: each rank keeps a share of its parameters, and has a block of them whole while it runs."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mdistiller.engine.ranks import Ranks


def shard(teacher: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Share out the parameters of `teacher`, which may lie in the host's memory, over the devices of the ranks (torch's
    FSDP2). One block at a time is whole there. Its passes exchange numbers: all ranks have to make as many.
    """
    if ranks.world == 1:
        teacher.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    teacher.requires_grad_(False).to(memory_format=torch.contiguous_format)  # FSDP2 takes no others
    for block in (*blocks(teacher), teacher):
        fully_shard(block, mesh=mesh)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a network that are called one after the other, those of its containers one by one."""
    for part in network.children():
        if isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from blocks(part)
        elif next(part.parameters(), None) is not None:
            yield part


def own_part(parameter: Tensor) -> Tensor:
    """Return what of a parameter lies on this rank."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter as one tensor, to which all ranks give their parts."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
