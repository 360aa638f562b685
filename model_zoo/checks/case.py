"""What the checks look at, and how a check is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.recording.inputs import make_inputs, tensors_of

SAME = 1e-5  # relative error of two float32 runs that compute the same in another order
DIFFERENT = 1e-3  # outputs that must differ differ by more, relative to the largest
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Case:
    """What the checks look at.

    ``dense``: the recorded model; ``inputs``: describes the example inputs; ``state``: the model's, before. Where a
    part was pruned, all of these are the part's, and ``whole`` and ``whole_pruned`` are the models it is part of.
    """

    spec: str
    flops: float
    model: nn.Module
    state: dict[str, Tensor]
    dense: fx.GraphModule
    pruned: fx.GraphModule
    inputs: dict[str, Any]
    figures: dict[str, Any]
    whole: nn.Module | None = None
    whole_pruned: nn.Module | None = None

    @property
    def report(self) -> fxprune.Report:
        report: fxprune.Report = self.pruned.meta["fxprune"]
        return report

    def run(self, module: nn.Module, batch: int | None = None, seed: int = 0, noise: int = 0) -> Any:
        """Outputs of ``module`` in its present mode on random inputs from ``seed``; ``noise`` seeds its dropout."""
        args, kwargs = make_inputs(self.inputs, batch=batch, seed=seed)
        torch.manual_seed(noise)
        with torch.no_grad():
            return module(*args, **kwargs)


Check = Callable[[Case], str]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a check; they run in this order."""
    return registered(CHECKS, "checks", name)


def registered(among: dict[str, Function], what: str, name: str) -> Callable[[Function], Function]:
    """What puts a function among others under a name of its own."""

    def register(function: Function) -> Function:
        if name in among:
            raise ValueError(f"two {what} are named {name!r}")
        among[name] = function
        return function

    return register


def equal(one: Any, other: Any) -> bool:
    """Whether all outputs are, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))


def shapes_of(outputs: Any) -> list[list[int]]:
    return [list(value.shape) for value in tensors_of(outputs)]
