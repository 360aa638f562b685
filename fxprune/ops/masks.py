"""For the oracle's counterparts of ops: what several of them need. Nothing here knows of labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def zero(x: Tensor) -> Any:
    return 0


def one(x: Tensor) -> Any:
    return 1


def smallest(x: Tensor) -> Any:
    """The least value of its dtype."""
    if x.dtype == torch.bool:
        return False
    return -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min


def largest(x: Tensor) -> Any:
    """The greatest value of its dtype."""
    if x.dtype == torch.bool:
        return True
    return torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).max


def normalised(
    x: Tensor, on: Tensor, dims: list[int], eps: float, centre: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd`` with both over the positions ``on``."""
    count = on.sum(dims, keepdim=True)
    mean = x.masked_fill(~on, 0).sum(dims, keepdim=True) / count if centre else x.new_zeros(())
    spread = ((x - mean).masked_fill(~on, 0) ** 2).sum(dims, keepdim=True) / count
    rstd = torch.rsqrt(spread + eps)
    return (x - mean) * rstd, mean, rstd
