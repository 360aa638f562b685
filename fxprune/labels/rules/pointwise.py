"""Pointwise ops: operands' labels are joined position by position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fxprune.labels.factors import Factor, Labels, aligned, expanded
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation

Operand = tuple[tuple[int, ...], Labels]


def join_positions(run: Propagation, operands: Sequence[Operand], shape: tuple[int, ...]) -> Labels:
    """Labels of the broadcast result.

    Args:
        run: the propagation.
        operands: shape and labels of each.
        shape: of the result.
    """
    ndim = len(shape)
    cuts: dict[int, list[Factor]] = defaultdict(list)
    lifted = [(sizes, [aligned(f, ndim) for f in labels]) for sizes, labels in operands]
    for _, factors in lifted:
        for factor in factors:
            cuts[factor.dim].append(factor)
    result = []
    for dim, factors in sorted(cuts.items()):
        first, *others = factors
        alike = [other.ids for other in others if other.ids.shape == first.ids.shape]
        if alike:  # all at once
            run.join(np.concatenate(alike), np.concatenate([first.ids] * len(alike)))
        for other in others:
            if first.ids.shape != other.ids.shape:
                run.join(first.ids, other.ids)
                first = Factor(expanded(first.ids, np.broadcast_shapes(first.ids.shape, other.ids.shape)), dim)
        result.append(first)
    rigid: set[int] = set()
    for sizes, factors in lifted:  # only now: rows that were joined above are one, and hold no dimension
        settled = [run.canonical(f) if f.carriers else f for f in factors]
        held = {d for f in settled for d in (f.dim, *f.carriers)}
        rigid |= {d for d, size in enumerate(sizes, ndim - len(sizes)) if size > 1 and d not in held}
    for factor in result:
        if factor.dim in rigid and shape[factor.dim] > 1:
            run.lock(factor.ids, "combined with something that cannot be cut")
    return tuple(result)


@rule("copy_")
def _copy(run: Propagation, call: Call) -> Labels:
    target, source = call["self"], call["src"]
    shape = tuple(target.shape)
    return join_positions(run, [(shape, run.labels(target)), (tuple(source.shape), run.labels(source))], shape)


@rule("fill", "zero", "normal", "uniform", "exponential", "random", "normal_functional")
def _overwrite(run: Propagation, call: Call) -> Labels:
    return run.labels(call.input)


@rule("glu")
def _glu(run: Propagation, call: Call) -> Labels:
    """``a * sigmoid(b)`` of the two halves along ``dim``."""
    dim = call.dims()[0]
    result = []
    for factor in run.labels(call.input):
        ids = factor.ids
        if ids.shape[dim] > 1:
            first, second = np.split(ids, 2, dim)
            run.join(first, second)
            ids = first
        result.append(Factor(ids, factor.dim))
    return tuple(result)
