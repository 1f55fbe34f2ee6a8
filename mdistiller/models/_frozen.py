"""Parts of a network that do not learn."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mdistiller.errors import UserError
from mdistiller.registry import nearest


def freeze(network: nn.Module, patterns: Sequence[str], name: str) -> None:
    """Let the parameters whose names match any of `patterns`, with * and ? as in a shell, learn no more.

    Raises UserError where a pattern matches none of the network, which is called `name`, or where nothing is left.
    """
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        matching = [key for key in parameters if fnmatchcase(key, pattern)]
        if not matching:
            parts = [f"{path}.*" for path, module in network.named_modules() if path and [*module.parameters()]]
            near = nearest(pattern, [*parts, *parameters], 3) or [part for part in parts if part.count(".") == 1]
            raise UserError(
                f"SOLVER.FREEZE: '{pattern}' matches no parameter of {name}; near it are {', '.join(near[:8])}"
            )
        for key in matching:
            parameters[key].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"SOLVER.FREEZE: {list(patterns)} leaves nothing of {name} that learns; leave a part out")


def frozen_norms(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the batch normalisations whose parameters do not learn, however they were frozen."""
    for module in network.modules():
        parameters = list(module.parameters()) if isinstance(module, _BatchNorm) else []
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield module
