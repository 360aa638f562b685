"""Weights that hide no mistake: random from a seed, and no two alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.recording.inputs import describe_inputs, make_inputs
from model_zoo.networks import example_inputs, load

BIAS = 0.1
NORM_BIAS = 0.6
AFFINE = ("weight", "bias")  # buffers of norm layers that do not train


def drawn(spec: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A network in eval mode with random weights and statistics, always the same, and its example inputs."""
    torch.manual_seed(0)
    model = load(spec).eval()
    args, kwargs = example_inputs(model)
    randomise(model, describe_inputs(args, kwargs))
    return model, args, kwargs


def randomise(model: nn.Module, inputs: dict[str, Any] | Callable[[], tuple[Any, Any]], seed: int = 0) -> None:
    """Make every index of every parameter and statistic differ from every other, and keep signals alive.

    The library's own initialisation stays where it is random, but no matrix lowers the scale of its input: with weights
    of 0.02 attention is all but uniform, and nothing depends on queries and keys. What is 1-D or constant (zero heads,
    layer scales of 1e-6, fresh affine terms) is drawn anew. Batch norms get random statistics at the scale of what they
    see: at an arbitrary scale the output of a deep network no longer depends on its input. Their biases are positive in
    the mean, since deep random networks of centred norms and ReLUs amplify rounding errors a thousandfold.

    ``inputs`` describes what the batch norms see, or makes it; without such norms the model is not run.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return (torch.randn(like.shape, generator=generator) * std).to(like)

    def positive(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=generator) + 0.5).to(like)

    def calibrate(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        power = args[0].square().mean([dim for dim in range(args[0].ndim) if dim != 1])
        power += 0.1 * power.mean() + 1e-4  # a channel that is all but dead here may not be on other inputs
        mean.copy_(normal(power, 0.2) * power.sqrt())
        variance.copy_(power * positive(power))

    modules = dict(model.named_modules())
    norms = {name: m for name, m in modules.items() if getattr(m, "running_var", None) is not None}
    frozen = [(f"{name}.{key}", b) for name, m in norms.items() for key, b in m.named_buffers() if key in AFFINE]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *frozen):
            if not tensor.numel():
                continue
            owner, _, last = name.rpartition(".")
            unit = (tensor.shape[0] / tensor.numel()) ** 0.5 if tensor.ndim > 1 else 1.0  # fan-in to the power of -1/2
            if last.endswith("bias"):
                tensor.copy_(normal(tensor, BIAS) + (NORM_BIAS if owner in norms else 0.0))
            elif tensor.ndim < 2:
                tensor.copy_(positive(tensor))
            elif bool((tensor == tensor.flatten()[0]).all()):
                tensor.copy_(normal(tensor, unit))
            elif last.endswith("weight") and not isinstance(modules[owner], nn.Embedding):
                tensor.mul_((unit / tensor.std()).clamp_min(1))
        hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms.values()]
        if hooks:
            args, kwargs = inputs() if callable(inputs) else make_inputs(inputs, batch=2, seed=seed)
            model(*args, **kwargs)
        for hook in hooks:
            hook.remove()
