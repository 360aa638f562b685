"""The commonest verb: operands' labels are joined position by position, as broadcasting lays them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from fxprune.labels.classes import same
from fxprune.labels.factors import Factor, Labels, aligned, expanded
from fxprune.labels.propagation import Propagation

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
    if run.attention == "heads":
        _join_whole_rows(run, lifted, ndim)
    for _, factors in lifted:
        for factor in factors:
            cuts[factor.dim].append(factor)
    result = []
    for dim, (first, *others) in sorted(cuts.items()):
        ids = first.ids
        unlike = [other.ids for other in others if not same(other.ids, ids)]
        alike = [other for other in unlike if other.shape == ids.shape]
        if alike:  # all at once
            run.join(np.concatenate(alike), np.concatenate([ids] * len(alike)))
        for other in unlike:
            if ids.shape != other.shape:
                run.join(ids, other)
                ids = expanded(ids, np.broadcast_shapes(ids.shape, other.shape))
        result.append(first if ids is first.ids else Factor(ids, dim))
    for factor in result:  # only now: rows that were joined above are one, and hold no dimension
        if shape[factor.dim] > 1 and _is_rigid(run, lifted, factor.dim, ndim):
            run.lock(factor.ids, "combined with something that cannot be cut")
    return tuple(result)


def _join_whole_rows(run: Propagation, operands: Sequence[tuple[tuple[int, ...], list[Factor]]], ndim: int) -> None:
    """Rows that meet what is the same for all of them, as heads meet a table of rotations: they go whole, or stay."""
    everything = [factor for _, factors in operands for factor in factors]
    for dim in {f.dim for f in everything if f.carriers and not run.all_locked(f)}:
        met = [f for f in everything if f.dim == dim]
        shared = any(one.ids.shape[c] > other.ids.shape[c] == 1 for one in met for c in one.carriers for other in met)
        if shared or _is_rigid(run, operands, dim, ndim):
            for _, factors in operands:
                factors[:] = [run.collapse(f, [dim]) if f.dim == dim else f for f in factors]
            run.rows_joined = True


def _is_rigid(run: Propagation, operands: Sequence[tuple[tuple[int, ...], list[Factor]]], dim: int, ndim: int) -> bool:
    """Has one of the operands several positions along ``dim`` of ``ndim``, and no channels there?"""
    for sizes, factors in operands:
        place = dim - ndim + len(sizes)
        if place < 0 or sizes[place] <= 1:
            continue
        for factor in factors:
            settled = run.canonical(factor) if factor.carriers else factor
            if settled.dim == dim or dim in settled.carriers:
                break
        else:
            return True
    return False
