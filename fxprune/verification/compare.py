"""How far the outputs of two networks are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fxprune.errors import VerificationError
from fxprune.recording.inputs import leaves_of, tensors_of

TOLERANCE = 1e-5
"""Largest accepted relative error in float32: ``max |pruned - masked| / max |masked|`` over every output."""

DOUBLE_TOLERANCE = 1e-9
"""The same where a network amplifies rounding so much that float32 exceeds its tolerance, computed in double."""

Compared = Literal["numbers", "flags", "nothing"]


@dataclass(frozen=True)
class Agreement:
    """Relative errors of the pruned model against the masked one: as it is, and in double where that was needed.

    ``compared``: what the outputs hold. Of flags alone (booleans) every one was the same, and no number can be told.
    ``constant``: the pruned model answers other inputs with the same numbers, which the dense one does not.
    """

    error: float
    in_double: float | None = None
    compared: Compared = "numbers"
    constant: bool = False


def relative_error(found: Any, expected: Any) -> float:
    """``max |found - expected| / max |expected|``, the largest over all output tensors; 1 where any flag differs.

    Of finite numbers; infinity where the others are not the same.

    Raises:
        VerificationError: if the outputs differ in structure or shape.
    """
    a, b = leaves_of(found), leaves_of(expected)
    if len(a) != len(b):
        raise VerificationError(f"The outputs differ in structure: {len(a)} values instead of {len(b)}.")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, Tensor):
            continue
        if not isinstance(x, Tensor) or x.shape != y.shape:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise VerificationError(f"The shape of an output differs: {shape} instead of {list(y.shape)}.")
        if y.numel() == 0:
            continue
        kind = torch.complex128 if y.is_complex() else torch.float64
        x, y = strided(x.detach()).to(kind), strided(y.detach()).to(kind)
        finite = y.isfinite()
        if not torch.equal(x.isfinite(), finite) or not _same(x[~finite], y[~finite]):
            return float("inf")
        x, y = x[finite], y[finite]
        if y.numel():
            scale = float(y.abs().max())
            worst = max(worst, float((x - y).abs().max()) / (scale if scale > 0 else 1.0))
    return worst


def _same(x: Tensor, y: Tensor) -> bool:
    """Are these numbers equal, where those that are none (NaN) are equal too?"""
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


def strided(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def compared(outputs: Any) -> Compared:
    """What these outputs hold that can be compared."""
    values = [t for t in tensors_of(outputs) if t.numel()]
    return "numbers" if any(t.dtype != torch.bool for t in values) else "flags" if values else "nothing"
