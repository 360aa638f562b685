"""An optimizer for the pruned model that goes on where the dense model's was."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import Parameter

from fxprune.errors import InputError, shown
from fxprune.recording.checks import check_unwrapped
from fxprune.rewriting import CUTS_KEY, Cuts

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


def carry_over(optimizer: AnyOptimizer, model: nn.Module, pruned: nn.Module) -> AnyOptimizer:
    """A copy of ``optimizer`` that drives ``pruned``: the same groups and options, and its state cut like the weights.

    Where a weight [64, 3, 7, 7] becomes [40, 3, 7, 7], a momentum [64, 3, 7, 7] keeps the same 40 channels, and so does
    a factor of Adafactor's, [64, 3, 7, 1]; single numbers (step counts) are copied. Parameters that went with
    a residual branch are left out. Learning-rate schedulers hold the optimizer they were given: make new ones for the
    result.

    Args:
        optimizer: over parameters of ``model``; not changed.
        model: as it was given to ``fxprune.prune``.
        pruned: what came out, not yet moved or wrapped.

    Raises:
        InputError: a parameter of the optimizer is not part of ``model``, ``pruned`` was not made from it, or the
            state has a shape that does not follow the parameter's (such optimizers start anew).

    Examples:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> carried = fxprune.carry_over(optimizer, model, small)
        >>> carried.param_groups[0]["lr"], carried.param_groups[0]["params"][0] is next(small.parameters())
        (0.001, True)
    """
    names = held_names(optimizer, model)
    cuts = {
        f"{path}." if path else "": module.meta[CUTS_KEY]
        for path, module in pruned.named_modules()
        if isinstance(module, fx.GraphModule) and isinstance(module.meta.get(CUTS_KEY), Cuts)
    }
    if not cuts:
        raise InputError(f"pruned is a {type(pruned).__name__} that fxprune.prune did not return.")
    after = dict(pruned.named_parameters(remove_duplicate=False))
    removed = {f"{prefix}{name}" for prefix, own in cuts.items() for name in own.removed}
    missing = [name for name in names.values() if name not in after and name not in removed]
    if missing:
        for path in cuts:
            check_unwrapped(pruned, path.removesuffix("."))
        raise InputError(f"{missing[0]} has no counterpart in pruned; pass the model that was given to fxprune.prune.")
    gone = {key: Parameter(torch.empty(0)) for key, name in names.items() if name not in after}
    memo = {key: gone[key] if key in gone else after[name] for key, name in names.items()}
    result = copy.deepcopy(optimizer, dict(memo))
    for attribute, held in vars(optimizer).items():
        # What subclasses add, torch's __getstate__ leaves out. A scheduler's wrapper of step is bound to the old one.
        if attribute not in vars(result) and not callable(held):
            result.__dict__[attribute] = copy.deepcopy(held, dict(memo))
    for group in result.param_groups:
        group["params"] = [p for p in group["params"] if all(p is not other for other in gone.values())]
    for key, name in names.items():
        new = memo[key]
        if key in gone:
            result.state.pop(new, None)
            continue
        prefix = next((p for p in sorted(cuts, key=len, reverse=True) if name.startswith(p)), None)
        for what, value in result.state.get(new, {}).items():
            if isinstance(value, Tensor) and value.numel() != 1 and prefix is not None:
                result.state[new][what] = _followed(cuts[prefix], name, name.removeprefix(prefix), what, value)
    return result


def held_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    """The parameters of ``optimizer``: id -> the first of their names in ``model``.

    Raises:
        InputError: it is no optimizer, or holds a parameter that is not the model's.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer is {shown(optimizer)}; pass a torch.optim.Optimizer over the model's parameters.")
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [list(p.shape) for p in held if id(p) not in names]
    if strangers:
        raise InputError(
            f"the optimizer holds a parameter of shape {strangers[0]} that is not part of the model; "
            "pass the model that its parameters were taken from."
        )
    return {id(p): names[id(p)] for p in held}


def _followed(cuts: Cuts, name: str, inner: str, what: str, value: Tensor) -> Tensor:
    try:
        return cuts.follow(inner, value)
    except ValueError as error:
        raise InputError(
            f"the optimizer's {what} of {name} {error}; start a new optimizer for the pruned model."
        ) from None
