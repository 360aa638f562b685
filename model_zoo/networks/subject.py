"""A network and its inputs, of any batch and size, from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Make = Callable[[int, Any, int], Inputs]


class NoCacheError(Exception):
    """The outputs hold no cache that a next step could take."""


@dataclass(frozen=True)
class Subject:
    """A network, and its inputs: ``make(batch, size, seed)``, where a size is whatever ``make`` takes for one.

    ``step`` makes the inputs of a step that takes the caches of the call before, from that call's inputs, its outputs
    and a seed.
    """

    model: nn.Module
    make: Make
    batch: int
    size: Any
    others: Sequence[Any] = ()
    step: Callable[[Inputs, Any, int], Inputs] | None = None

    def example(self) -> Inputs:
        return self.make(self.batch, self.size, 0)


def normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def whole(low: int, high: int, shape: Sequence[int], seed: int) -> Tensor:
    """Whole numbers from ``low`` to below ``high``."""
    return torch.randint(low, high, tuple(shape), generator=torch.Generator().manual_seed(seed))
