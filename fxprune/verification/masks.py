"""Which positions of a tensor stay. What ops do with that, their records say (``mask`` in the table of ops)."""

from __future__ import annotations

from torch import Tensor


def fits(mask: Tensor, operand: Tensor) -> bool:
    return mask.ndim == operand.ndim and all(m in (1, s) for m, s in zip(mask.shape, operand.shape, strict=True))


def on_all(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.to(tensor.device).expand(tensor.shape)
