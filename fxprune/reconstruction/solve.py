"""Least squares from sums over rows: ``min |X D + 1 c - R|^2 + ridge |D|^2`` for several matrices ``D`` side by side.

``X [R, K]`` are inputs, ``R [R, O]`` what the outputs lack, so ``D`` is the change of a weight and ``c`` that of a
bias. All sums are in double precision. The ridge is relative to the mean eigenvalue of the Gram matrix ``X^T X``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RIDGES = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried with ``ridge="auto"``, the smallest first."""


class Sums:
    """Sums over rows of ``groups`` products. ``rows``: how many there were."""

    def __init__(self, shape: Sequence[int], device: torch.device):
        """``shape``: of the matrices, ``[groups, inputs, outputs]``."""
        groups, inputs, outputs = shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows = 0
        self.gram, self.cross = zeros(groups, inputs, inputs), zeros(groups, inputs, outputs)
        self.x, self.r, self.t = zeros(groups, inputs), zeros(groups, outputs), zeros(groups, outputs)
        self.rr, self.tt = zeros(groups, outputs), zeros(groups, outputs)

    def add(self, x: Tensor, r: Tensor, t: Tensor, group: Tensor | None = None) -> None:
        """Rows of inputs ``[g, R, K]``, of what the outputs lack and of what they should be ``[g, R, O]``.

        ``group``: of each of them the one here, where several share a matrix; then there have to be equally many. If
        there is one here, it is of all of them.
        """
        x, r, t = x.double(), r.double(), t.double()
        if len(self.gram) == 1:
            x, r, t = (part.flatten(0, 1).unsqueeze(0) for part in (x, r, t))
        elif group is not None:
            x, r, t = (_joined(part, group) for part in (x, r, t))
        self.rows += x.shape[1]
        self.gram += x.transpose(1, 2) @ x
        self.cross += x.transpose(1, 2) @ r
        self.x += x.sum(1)
        self.r += r.sum(1)
        self.t += t.sum(1)
        self.rr += (r * r).sum(1)
        self.tt += (t * t).sum(1)

    def rebase(self, change: Tensor, shift: Tensor) -> None:
        """From now on ``R`` is what is lacking with this change made."""
        done = self.gram @ change
        mean = (self.x.unsqueeze(1) @ change).squeeze(1)
        self.rr += (change * (done - 2 * self.cross)).sum(1) + shift * (2 * mean - 2 * self.r + self.rows * shift)
        self.cross -= done + self.x.unsqueeze(2) * shift.unsqueeze(1)
        self.r -= mean + self.rows * shift

    @property
    def is_finite(self) -> bool:
        return bool(self.gram.isfinite().all()) and bool(self.rr.isfinite().all())

    def centred(self) -> tuple[Tensor, Tensor]:
        """Gram and cross-Gram about the means."""
        n = max(self.rows, 1)
        return (
            self.gram - self.x.unsqueeze(2) * self.x.unsqueeze(1) / n,
            self.cross - self.x.unsqueeze(2) * self.r.unsqueeze(1) / n,
        )

    def left(self, change: Tensor, shift: Tensor) -> float:
        """``|X D + c - R|^2`` over all rows."""
        fit = (change * (self.gram @ change - 2 * self.cross)).sum()
        by_shift = (shift * (2 * (self.x.unsqueeze(1) @ change).squeeze(1) - 2 * self.r + self.rows * shift)).sum()
        return max(float(self.rr.sum() + fit + by_shift), 0.0)

    @property
    def spread(self) -> float:
        """``|T - mean T|^2``: what an error is compared with."""
        return float((self.tt - self.t**2 / max(self.rows, 1)).sum())


def _joined(rows: Tensor, group: Tensor) -> Tensor:
    """The rows ``[g, R, n]`` of equal groups one after the other."""
    parts = [rows[(group == index).to(rows.device)].flatten(0, 1) for index in range(int(group.max()) + 1)]
    return torch.stack(parts)


@dataclass(frozen=True)
class Change:
    """What is added to a weight ``[g, K, O]`` and a bias ``[g, O]``. ``after``: what is ``left`` on held-out rows."""

    weight: Tensor
    bias: Tensor
    ridge: float
    after: float


def solve(fit: Sums, held: Sums, centred: bool, ridge: float | Literal["auto"]) -> Change:
    """The change with the ridge that leaves least on held-out rows; at worst none, of ridge ``inf``.

    From the middle of ``RIDGES`` the search goes the way that leaves less, until it leaves more: a solve is cubic in
    the inputs. ``centred``: the bias may change too. With no change of the weight it is the mean of what the outputs
    lack.
    """
    gram, cross = fit.centred() if centred else (fit.gram, fit.cross)
    nothing = torch.zeros_like(fit.r)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    unchanged = torch.zeros_like(cross)

    def judged(change: Tensor | None, ridge: float) -> Change:
        if change is None:
            return Change(unchanged, nothing, ridge, float("inf"))
        shift = (fit.r - (fit.x.unsqueeze(1) @ change).squeeze(1)) / max(fit.rows, 1) if centred else nothing
        return Change(change, shift, ridge, held.left(change, shift))

    def tried(ridge: float) -> Change:
        return judged(_solved(gram, cross, ridge * scale), ridge)

    best = Change(unchanged, nothing, float("inf"), held.left(unchanged, nothing))
    if centred:
        best = min(best, judged(unchanged, float("inf")), key=_left)
    if ridge != "auto":
        return min(best, tried(float(ridge)), key=_left)
    middle = len(RIDGES) // 2
    found = tried(RIDGES[middle])
    for way in (RIDGES[:middle][::-1], RIDGES[middle + 1 :]):
        start = found
        for candidate in way:
            other = tried(candidate)
            if other.after >= found.after:
                break
            found = other
        if found is not start:
            break
    return min(best, found, key=_left)


def _left(change: Change) -> float:
    return change.after


def _solved(gram: Tensor, cross: Tensor, ridge: Tensor) -> Tensor | None:
    """``(gram + ridge)^-1 cross``; None where that is not defined in double precision."""
    live = ridge > 0  # a group without any input stays as it is
    ridge = torch.where(live, ridge, torch.ones_like(ridge))
    damped = gram.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        return None
    found = torch.cholesky_solve(cross, factor)
    return found if bool(found.isfinite().all()) else None
