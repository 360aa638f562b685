"""Which branches go, together with how wide the others stay: both measured by what is left of the outputs.

Branches are ranked once, by the error of the outputs without them per MAC that goes with them. Then the same budget is
met with none of them gone, with a few, and so on to as many as it takes, and what the outputs lose least by is taken.
Where there are data each network is refitted on them before it is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, fx

from fxprune.depth.branches import Branch, branches_of
from fxprune.depth.removal import answer, compared_with_zeroed, without
from fxprune.errors import BudgetError, InputError, ModelError
from fxprune.io.text import some
from fxprune.labels.classes import Reason
from fxprune.pipeline import Dense, shallower
from fxprune.reconstruction.data import Piece, held_out
from fxprune.reconstruction.refit import refit
from fxprune.reconstruction.walk import floating, square
from fxprune.rewriting import CUTS_KEY, Cuts
from fxprune.verification import TOLERANCE, Inputs

RANKED_ON, JUDGED_ON = 32, 256
"""Samples of the data on which branches are ranked, and networks are judged."""

_STEPS = 4  # from none gone to so many that the budget is met without cuts
_FINER = 2  # numbers that are tried between the best one and its neighbours
_OVER = 0.01  # of the budget may be left unused for the sake of a branch


def usable(dense: Dense, most: float) -> tuple[list[Branch], dict[str, Reason]]:
    """The branches that can go, and why others cannot.

    ``most``: of the MACs, in (0, 1], that may go. A graph without the branch is compared with the dense one whose
    branch is set to zero.
    """
    sizes = dense.other_run
    found, refused = branches_of(dense.module, dense.graph, lambda one, other: sizes.of(one) == sizes.of(other))
    whole, why, good = dense.graph.macs(), dict(refused), list[Branch]()
    for branch in found:
        reason = ""
        if branch.macs > most * whole:
            reason = f"it has {branch.macs / whole:.0%} of the MACs, and {most:.0%} are to go"
        elif not _follows(dense, branch):
            reason = "without it the graph computes something else than with zeros for it"
        if reason:
            why[branch.name] = Reason(reason, branch.source)
        else:
            good.append(branch)
    return good, why


def chosen(
    dense: Dense, share: float, ratio: float, pieces: Sequence[Piece], attempt: Callable[[Dense], fx.GraphModule]
) -> Dense:
    """The dense model without the branches that go, which may be none.

    Args:
        dense: with all of them.
        share: of the branches that may go, in (0, 1].
        ratio: of the MACs that are to stay, in (0, 1]; a guess will do.
        pieces: data to refit on; none: networks are judged as they are cut, on the example inputs.
        attempt: meets the budget, and raises a BudgetError where it cannot.

    Raises:
        InputError: ``share`` is less than one branch.
        ModelError: no branch can go.
        BudgetError: the budget cannot be met.
    """
    with dense.stages("finding branches"):
        good, why = usable(dense, 1 - ratio)
    if not good:
        told = some([f"{name}: {reason}" for name, reason in why.items()]) or "nothing is added to a stream"
        raise ModelError(f"depth=: no residual branch can go ({told}). Leave depth= out.")
    most = math.floor(share * len(good) + 1e-9)
    if not most:
        raise InputError(
            f"depth={share:g} of {len(good)} branches is none of them: pass at least {1 / len(good):.2g}, or True."
        )
    with dense.stages("ranking branches"):
        order = _ranked(dense, good, _few(pieces, RANKED_ON))
    left = dense.graph.macs() - np.cumsum([branch.macs for branch in order])
    budget = ratio * dense.graph.macs()
    tried = _Tried(dense, order, _few(pieces, JUDGED_ON), attempt)
    top = min(most, int(np.count_nonzero(left >= (1 - _OVER) * budget)))
    for step in range(_STEPS + 1):
        tried(round(step * top / _STEPS))
    for _ in range(_FINER):
        tried(*tried.between())
    if not tried.is_met and top < most:
        tried(top + 1)  # where channels cannot do the rest
    return tried.best()


class _Tried:
    """Numbers of branches that were tried. ``errors``: what the outputs lost, infinity where no cut met the budget."""

    def __init__(
        self, dense: Dense, order: Sequence[Branch], pieces: Sequence[Piece], attempt: Callable[[Dense], fx.GraphModule]
    ):
        self._dense, self._order, self._pieces, self._attempt = dense, order, pieces, attempt
        self._made: dict[int, Dense] = {}
        self._refused: BudgetError | None = None
        self.errors: dict[int, float] = {}

    def __call__(self, *counts: int) -> None:
        for count in counts:
            if count not in self.errors:
                self._made[count] = shallower(self._dense, self._order[:count]) if count else self._dense
                try:
                    cut = self._attempt(self._made[count])
                except BudgetError as error:
                    self._refused, self.errors[count] = error, math.inf
                except (InputError, ModelError):
                    if not count:
                        raise
                    self.errors[count] = math.inf  # what is asked of widths is of branches that went
                else:
                    with self._dense.stages("judging"):
                        self.errors[count] = damage(self._dense.module, cut, self._pieces, _example(self._dense))

    @property
    def is_met(self) -> bool:
        """Whether the budget was met with any number."""
        return any(map(math.isfinite, self.errors.values()))

    def between(self) -> Iterator[int]:
        """The numbers halfway from the best one to its neighbours."""
        best, counts = min(self.errors, key=self._rank), sorted(self.errors)
        place = counts.index(best)
        for other in (*counts[max(place - 1, 0) : place], *counts[place + 1 : place + 2]):
            if abs(other - best) > 1:
                yield (other + best) // 2

    def _rank(self, count: int) -> tuple[float, int]:
        return self.errors[count], count

    def best(self) -> Dense:
        count = min(self.errors, key=self._rank)
        if math.isinf(self.errors[count]):
            assert self._refused is not None, "something was tried"
            raise self._refused
        return self._made[count]


def damage(dense: fx.GraphModule, cut: fx.GraphModule, pieces: Sequence[Piece], example: Inputs) -> float:
    """``|cut - dense|^2 / |dense|^2`` of the outputs: after a refit on held-out data, or on an example without data."""
    if pieces:
        cuts = cut.meta.get(CUTS_KEY) or Cuts({}, {}, np.ones(0, dtype=np.bool_))
        error = refit(dense, cut, pieces, cuts)[1].output_after
        if error is not None:
            return error if math.isfinite(error) else math.inf
    outputs = [floating(answer(module, example)) for module in (dense, cut)]
    pairs = [(y, now) for y, now in zip(*outputs, strict=True) if y.shape == now.shape]
    gap, whole = (sum(float(square(a, b)) for a, b in each) for each in (pairs, [(y * 0, y) for y, _ in pairs]))
    error = gap / max(whole, 1e-300)
    return error if math.isfinite(error) else math.inf


def _follows(dense: Dense, branch: Branch) -> bool:
    shallow = without(dense.module, [branch])
    try:
        return compared_with_zeroed(dense.module, shallow, [branch], _example(dense)) <= TOLERANCE
    except Exception:  # what is left does not run
        return False


def _ranked(dense: Dense, branches: Sequence[Branch], pieces: Sequence[Piece]) -> list[Branch]:
    """What costs the outputs least per MAC first."""
    costs = {b: damage(dense.module, without(dense.module, [b]), pieces, _example(dense)) / b.macs for b in branches}
    return sorted(branches, key=lambda branch: costs[branch])


def _example(dense: Dense) -> Inputs:
    return dense.args, dense.kwargs


def _few(pieces: Sequence[Piece], samples: int) -> list[Piece]:
    """The first pieces that hold so many samples, a fifth of them held out; two at least."""
    count, found = 0, list[Piece]()
    for piece in pieces:
        if count >= samples and len(found) > 1:
            break
        found.append(replace(piece, held=False))
        count += piece.samples
    return held_out(found) if found else []


def part_of_data(data: Any) -> Any:
    """Of data as users pass them the first that hold ``JUDGED_ON`` samples."""
    if data is None:
        return None
    if isinstance(data, Tensor):
        return data[:JUDGED_ON]
    found, count = [], 0
    for item in islice(data, JUDGED_ON):
        found.append(item)
        first = item[0] if isinstance(item, (tuple, list)) and item else item
        count += len(first) if isinstance(first, Tensor) and first.ndim else 1
        if count >= JUDGED_ON:
            break
    return found
