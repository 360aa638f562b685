"""Weights drawn anew, with the layers' own initialisers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.training.randomness import seeded


def reset_parameters(module: nn.Module, seed: int) -> list[str]:
    """Initialise a module anew, in place: no value of it stays.

    Layers that have ``reset_parameters()`` (all of torch's) use it. A parameter that no layer initialises (a class
    token, a layer scale) is drawn from a normal distribution with the mean and standard deviation of its values; one
    that is constant stays. Buffers that are no layer's stay.

    Args:
        module: with its final shapes.
        seed: of the draw.

    Returns:
        The names of the parameters that were drawn like their values.
    """
    drawn = []
    done: set[int] = set()
    with seeded(seed), torch.no_grad():
        for layer in module.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
                done |= {id(p) for p in layer.parameters()}
        for name, parameter in module.named_parameters():
            if id(parameter) not in done and not parameter.is_meta:
                _draw(parameter)
                drawn.append(name)
    return drawn


def _draw(parameter: Tensor) -> None:
    mean = parameter.mean()
    std = parameter.std() if parameter.numel() > 1 else torch.zeros_like(mean)
    parameter.copy_(mean + std * torch.randn_like(parameter))
