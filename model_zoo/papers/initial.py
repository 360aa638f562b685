"""How the papers' code draws the first weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
_WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def he(model: Module, gamma: float = 1.0) -> Module:
    """Convolutions from N(0, sqrt(2 / (k^2 C_out))), batch norms ``gamma`` and 0, linear layers from N(0, 0.01).

    What Pruning from Scratch and Network Slimming start from; ``gamma`` is 0.5 in all networks of Network Slimming
    and in the VGGs of Pruning from Scratch.
    """
    for module in model.modules():
        match module:
            case nn.Conv2d():
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            case nn.Linear():
                nn.init.normal_(module.weight, std=0.01)
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                nn.init.constant_(module.weight, gamma)
            case _:
                continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def xavier(model: Module, draw: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_) -> Module:
    """Every convolution and linear layer by Glorot and Bengio, with biases 0; batch norms are left alone."""
    for module in model.modules():
        if isinstance(module, _WEIGHTED):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
