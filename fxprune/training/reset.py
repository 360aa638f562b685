"""Weights drawn anew, with the layers' own initialisers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.training.randomness import seeded


def reset_parameters(module: nn.Module, seed: int) -> list[str]:
    """Initialise a module anew, in place: no value of it stays, but for what is frozen.

    Layers that have ``reset_parameters()`` (all of torch's) use it. A parameter that no layer initialises (a class
    token, a layer scale) is drawn from a normal distribution with the mean and standard deviation of its values; one
    that is constant stays. Buffers that are no layer's stay, and parameters that no training would change
    (``requires_grad=False``: a table of sines, a fixed filter), with the buffers of a layer that has no others.

    Args:
        module: with its final shapes.
        seed: of the draw.

    Returns:
        The names of the parameters that were drawn like their values.
    """
    drawn = []
    done: set[int] = set()
    frozen = [(p, p.detach().clone()) for p in module.parameters() if not p.requires_grad]
    with seeded(seed), torch.no_grad():
        for layer in module.modules():
            reset, own = getattr(layer, "reset_parameters", None), [*layer.parameters()]
            if callable(reset) and (not own or any(p.requires_grad for p in own)):
                reset()
                done |= {id(p) for p in own}
        for name, parameter in module.named_parameters():
            if id(parameter) not in done and parameter.requires_grad and not parameter.is_meta:
                _draw(parameter)
                drawn.append(name)
        for parameter, values in frozen:
            parameter.copy_(values)
    return drawn


def _draw(parameter: Tensor) -> None:
    mean = parameter.mean()
    std = parameter.std() if parameter.numel() > 1 else torch.zeros_like(mean)
    parameter.copy_(mean + std * torch.randn_like(parameter))
